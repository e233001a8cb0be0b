"""The two-outcome case from logits: q = {σ(x), 1 - σ(x)}, one logit x = log q/(1-q) for each distribution, elementwise.

Formulas are written in e = e^-|x| ≤ 1, the odds of the less probable outcome, so that nothing overflows or cancels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jce._jax.public import public
from jce._jax.rows import elementwise
from jce._numerics.calculus import custom_jvp, def_partials
from jce._numerics.elementary import exp, exponential_minus_1, log1p_unit, one_minus, reused, tanh
from jce._numerics.mul0 import mul0


@public()
def binary_entropy_with_logits(logits: ArrayLike) -> Array:
    """H(α) = α log 1/α + (1-α) log 1/(1-α) at α = σ(logits), in nats: the entropy of {α, 1-α}, elementwise.

    Example:
      >>> print(jce.binary_entropy_with_logits(jnp.array([0.0, 20.0, -jnp.inf])))
      [6.9314718e-01 4.3284228e-08 0.0000000e+00]

    Args:
      logits: real, any shape, log α/(1-α).

    Returns:
      The shape of logits; float32, or float64 if logits is.

    At the boundary:
      At ±∞ the outcome is certain: H = 0, with derivative 0. NaN gives NaN.

    Derivative:
      dH/dx = -x σ(x) σ(-x), in logits' dtype.

    Raises:
      TypeError: an argument is not real.

    Not checked:
      Values. Subnormal probabilities, at |logit| > 87.3 (708.3 in float64), may count as 0.

    See "Conventions" in jce/README.md.
    """
    (x,) = elementwise("binary_entropy_with_logits", logits=logits)
    return _entropy_of_sigmoid(x)


@custom_jvp
def _entropy_of_sigmoid(x):
    e = _odds_against(x)
    h = jnp.abs(x) * (e / (1 + e)) + log1p_unit(e)
    # |x| e is ∞ · 0 at ±∞. The select comes last, so that on a CPU one loop computes h for a sum that follows.
    return jnp.where(e == 0, jnp.zeros_like(h), h)


# dH/dx = -x σ(x) σ(-x)
def_partials(_entropy_of_sigmoid, lambda x: mul0(-_finite(x), _variance(x)))


@public()
def binary_cross_entropy_with_logits(alpha: ArrayLike, logits: ArrayLike) -> Array:
    """H(α, β) = α log 1/β + (1-α) log 1/(1-β) at β = σ(logits), in nats: the binary cross-entropy, elementwise.

    Example:
      >>> print(jce.binary_cross_entropy_with_logits(1.0, jnp.array([0.0, 20.0, jnp.inf])))
      [6.9314718e-01 2.0611537e-09 0.0000000e+00]

    It is relatively accurate where the model is sure and right. As a function of the logits it is minimal at β = α.

    Args:
      alpha: real, the target's probabilities. Shapes broadcast.
      logits: real, the model's log β/(1-β).

    Returns:
      The broadcast shape; float32, or float64 if alpha or logits is.

    At the boundary:
      At ±∞, β is exactly 1 or 0: where α = β, H = 0, with ∂H/∂x = 0; else H = +∞, with ∂H/∂x = β - α. NaN gives NaN.

    Derivative:
      ∂H/∂x = σ(x) - α, ∂H/∂α = -x, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      0 ≤ α ≤ 1.

    See "Conventions" in jce/README.md.
    """
    alpha, x = elementwise("binary_cross_entropy_with_logits", alpha=alpha, logits=logits)
    return _cross_entropy_of_sigmoid(alpha, x)


@custom_jvp
def _cross_entropy_of_sigmoid(a, x):
    weight, softplus = jnp.where(x < 0, a, one_minus(a)), log1p_unit(_odds_against(x))
    # The select comes last: else XLA on a CPU would store intermediate arrays for a sum that follows.
    return jnp.where(weight == 0, softplus, jnp.abs(x) * weight + softplus)


# ∂H/∂α = -x, ∂H/∂x = σ(x) - α
def_partials(_cross_entropy_of_sigmoid, lambda a, x: -x, lambda a, x: _sigmoid_excess(a, x))


@public()
def binary_kl_divergence_with_logits(alpha_logits: ArrayLike, beta_logits: ArrayLike) -> Array:
    """KL(α‖β) = α log α/β + (1-α) log (1-α)/(1-β) at α = σ(alpha_logits), β = σ(beta_logits), in nats, elementwise.

    Example:
      >>> print(jce.binary_kl_divergence_with_logits(jnp.array([1.0, 1.0]), jnp.array([1.0, 1.001])))
      [0.0000000e+00 9.8300006e-08]

    It is ≥ 0 to the last bit, and relatively accurate also where α ≈ β. Not symmetric.

    Args:
      alpha_logits: real, the target's log α/(1-α). Shapes broadcast.
      beta_logits: real, the model's log β/(1-β).

    Returns:
      The broadcast shape; float32, or float64 if alpha_logits or beta_logits is.

    At the boundary:
      At ±∞, α or β is exactly 1 or 0. KL = 0 where both logits are the same infinity, with derivatives 0. KL = +∞ where
      only y is infinite, with ∂KL/∂x = ±∞, or where they are opposite infinities, with ∂KL/∂x = 0. NaN gives NaN.

    Derivative:
      ∂KL/∂x = σ(x) σ(-x) (x - y), ∂KL/∂y = σ(y) - σ(x), with x = alpha_logits and y = beta_logits, each in its
      argument's dtype.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      Values. Subnormal probabilities, at |logit| > 87.3 (708.3 in float64), may count as 0.

    See "Conventions" in jce/README.md.
    """
    x, y = elementwise("binary_kl_divergence_with_logits", alpha_logits=alpha_logits, beta_logits=beta_logits)
    return _kl_of_sigmoid(x, y)


@custom_jvp
def _kl_of_sigmoid(x, y):
    d = _minus(y, x)
    near = jnp.abs(d) < FARTHEST
    return jnp.where(near, d * d * _mean_variance(x, d), _kl_of_far(x, y))  # the select last, as above


def _kl_of_far(x, y):
    """log (1 + e^y)/(1 + e^x) - σ(x) (y - x); for x > 0 that of -x and -y, which is the same and cancels less."""
    e, f = _odds_against(x), _odds_against(y)
    y = jnp.where(x < 0, y, -y)
    above = jax.nn.relu(y)
    # max(y, 0) - σ(x) (y - x), over the common denominator 1 + e
    rest = (above - mul0(jnp.where(y > 0, jnp.abs(x), y + jnp.abs(x)), e)) / (1 + e)
    return rest + (log1p_unit(f) - log1p_unit(e))


def _mean_variance(x, d):
    """KL(α‖β)/d² = ∫ (1-s) σ'(x + s d) ds from 0 to 1: a quadrature is a sum of positive terms, so nothing cancels."""
    # e^-|x + s d| as e^-|x| times e^±s d: the rounding of x + s d would cost its exponential up to 32 ulps.
    e, away = _odds_against(x), jnp.where(x < 0, -d, d)
    return sum(w * _variance_of_odds(e * exp(-s * away)) for s, w in QUADRATURE[np.dtype(x.dtype)])


# ∂KL/∂x = σ(x) σ(-x) (x - y), ∂KL/∂y = σ(y) - σ(x)
def_partials(_kl_of_sigmoid, lambda x, y: _weighted_margin(x, y), lambda x, y: _sigmoid_difference(x, y))


def _quadrature(points: int) -> list[tuple[float, float]]:
    """Gauss nodes and weights for ∫ (1-s) f(s) ds from 0 to 1, exact for polynomials below degree 2 · points.

    They come from eigenvalues and eigenvectors of the recurrence of the Jacobi polynomials (1, 0) (G. H. Golub and
    J. H. Welsch, Calculation of Gauss Quadrature Rules, 1969).
    """
    k = np.arange(points)
    beside = np.sqrt(k * (k + 1.0))[1:] / (2 * k[1:] + 1)
    places, vectors = np.linalg.eigh(
        np.diag(-1 / ((2 * k + 1) * (2 * k + 3))) + np.diag(beside, 1) + np.diag(beside, -1)
    )
    return list(zip(((1 + places) / 2).tolist(), (vectors[0] ** 2 / 2).tolist(), strict=True))


# The nearest poles of σ' are ±iπ. On an interval of half-width h = 5/4 the error of k points falls as ρ⁻²ᵏ with
# ρ = π/h + √(π²/h² + 1) = 5.2. It is at most 1.8e-8 of the value for k = 6, a third of float32's 2⁻²⁴, and 8e-17 for
# k = 12. For |d| > 5/2 the difference in `_kl_of_far` is at least a third of its greater term.
FARTHEST = 2.5
QUADRATURE = {np.dtype("float32"): _quadrature(6), np.dtype("float64"): _quadrature(12)}


# Factors of the derivatives


@custom_jvp
def _sigmoid_excess(a, x):
    e = _odds_against_again(x)
    return jnp.where(x < 0, one_minus(a) * e - a, one_minus(a) - a * e) / (1 + e)


# ∂/∂α (σ(x) - α) = -1, ∂/∂x (σ(x) - α) = σ(x) σ(-x)
def_partials(_sigmoid_excess, lambda a, x: -jnp.ones_like(a), lambda a, x: _variance(x))


@custom_jvp
def _variance(x):
    """σ(x) σ(-x)."""
    return reused(_variance_of_odds(_odds_against_again(x)))


def _variance_of_odds(e):
    """e/(1 + e)², with 1 + e(2 + e) for the square: squaring would double the rounding error of 1 + e."""
    return e / (1 + e * (2 + e))


# d/dx σ(x) σ(-x) = -σ(x) σ(-x) tanh x/2
def_partials(_variance, lambda x: -_variance(x) * tanh(x / 2))


@custom_jvp
def _sigmoid_difference(x, y):
    """σ(y) - σ(x) = ±σ(more) σ(-less) (1 - e^-|y-x|), where less and more are the lesser and the greater of x and y."""
    d = _minus(y, x)
    less, more = jnp.minimum(x, y), jnp.maximum(x, y)
    e, f = _odds_against_again(less), _odds_against_again(more)
    # σ(more) σ(-less) (1 + e)(1 + f), which is one of e, f and 1, so nothing is rounded
    largest = jnp.where(less > 0, e, jnp.where(more < 0, f, jnp.ones_like(e)))
    size = jnp.abs(d)
    gap = jnp.where(size < 1.5, -exponential_minus_1(-size), 1 - exp(-size))
    return jnp.copysign(largest * gap / ((1 + e) * (1 + f)), d)


# ∂/∂x (σ(y) - σ(x)) = -σ(x) σ(-x), ∂/∂y = σ(y) σ(-y)
def_partials(_sigmoid_difference, lambda x, y: -_variance(x), lambda x, y: _variance(y))


@custom_jvp
def _weighted_margin(x, y):
    """σ(x) σ(-x) (x - y)"""
    return mul0(_minus(x, y), _variance(x))


# ∂/∂x σσ (x - y) = σσ (1 - tanh(x/2) (x - y)), ∂/∂y σσ (x - y) = -σσ
def_partials(
    _weighted_margin,
    lambda x, y: _variance(x) - mul0(_weighted_margin(x, y), tanh(x / 2)),
    lambda x, y: -_variance(x),
)


def _minus(x, y):
    """x - y, but 0 instead of NaN where both are the same infinity."""
    return jnp.where(x == y, jnp.zeros_like(x), x - y)


def _finite(x):
    """x, but finite at ±∞: there σ(x) σ(-x) = 0, and 0 · ∞ would be NaN."""
    return jnp.clip(x, -1e4, 1e4)


def _sigmoid(x, odds_against):
    e = odds_against(x)
    return reused(jnp.where(x < 0, e, jnp.ones_like(e)) / (1 + e))


def _odds_against(x):
    """e^-|x|: the odds of the less probable outcome."""
    return reused(exp(-jnp.abs(x)))


def _odds_against_again(x):
    """e^-|x| written differently, for derivatives: else XLA would store the value's as a residual for both."""
    return reused(exp(jnp.minimum(x, -x)))
