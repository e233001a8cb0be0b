"""The KL divergence of two distributions over two outcomes, given by one logit each, elementwise.

If the logits are near each other, it is a quadrature, which is a sum of positive terms. If they are far apart, it is a
formula in the odds e^-|x|, e^-|y| ≤ 1.
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
from jce._numerics.elementary import exp, exponential_minus_1, log1p_unit, tanh
from jce._numerics.mul0 import mul0
from jce._quantities.binary_with_logits import (
    odds_against,
    odds_against_again,
    variance,
    variance_of_odds,
)


@public()
def binary_kl_divergence_with_logits(alpha_logits: ArrayLike, beta_logits: ArrayLike) -> Array:
    """KL(α‖β) of {α, 1-α} and {β, 1-β} for each pair of logits, in nats.

    KL(α‖β) = α log α/β + (1-α) log (1-α)/(1-β) with α = σ(alpha_logits) and β = σ(beta_logits)

    Example:
      >>> print(jce.binary_kl_divergence_with_logits(jnp.array([1.0, 1.0]), jnp.array([1.0, 1.001])))
      [0.0000000e+00 9.8300006e-08]

    Rounding never makes it negative, and its relative error is small even if α ≈ β. It is not symmetric.

    Args:
      alpha_logits: real, the target's log-odds, log α/(1-α). Shapes broadcast.
      beta_logits: real, the model's log β/(1-β).

    Returns:
      The broadcast shape; float32, or float64 if alpha_logits or beta_logits is.

    At the boundary:
      At a logit of ±∞, α or β is exactly 1 or 0. With x = alpha_logits and y = beta_logits: If both are the same
      infinity, KL = 0, with derivatives 0. If only y is infinite, KL = +∞, with ∂KL/∂x = ±∞. If they are opposite
      infinities, KL = +∞, with ∂KL/∂x = 0. NaN gives NaN.

    Derivative:
      ∂KL/∂x = σ(x) σ(-x) (x - y), ∂KL/∂y = σ(y) - σ(x), with x = alpha_logits and y = beta_logits, each in its
      argument's dtype.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      |logit| ≤ 87.3 (708.3 in float64). Beyond it, one outcome has a subnormal probability, which may count as 0.

    See "Conventions" in jce/README.md.
    """
    x, y = elementwise("binary_kl_divergence_with_logits", alpha_logits=alpha_logits, beta_logits=beta_logits)
    return _kl_of_sigmoid(x, y)


@custom_jvp
def _kl_of_sigmoid(x, y):
    d = _minus(y, x)
    near = jnp.abs(d) < FARTHEST
    # The select comes last, as in `_cross_entropy_of_sigmoid`.
    return jnp.where(near, d * d * _mean_variance(x, d), _kl_of_far(x, y))


def _kl_of_far(x, y):
    """log (1 + e^y)/(1 + e^x) - σ(x) (y - x). For x > 0 it is computed at -x and -y: the value is the same, and less
    cancels."""
    e, f = odds_against(x), odds_against(y)
    y = jnp.where(x < 0, y, -y)
    above = jax.nn.relu(y)
    # This is max(y, 0) - σ(x) (y - x), over the common denominator 1 + e.
    rest = (above - mul0(jnp.where(y > 0, jnp.abs(x), y + jnp.abs(x)), e)) / (1 + e)
    return rest + (log1p_unit(f) - log1p_unit(e))


def _mean_variance(x, d):
    """KL(α‖β)/d² = ∫ (1-s) σ'(x + s d) ds from 0 to 1, by a quadrature: a sum of positive terms, so nothing cancels."""
    # e^-|x + s d| is computed as e^-|x| times e^±s d. The rounding of x + s d would put the exponential off by up to 32
    # ulps.
    e, away = odds_against(x), jnp.where(x < 0, -d, d)
    return sum(w * variance_of_odds(e * exp(-s * away)) for s, w in QUADRATURE[np.dtype(x.dtype)])


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


# The nearest poles of σ' are ±iπ. On an interval of half-width h = 5/4, the error with k points falls as ρ⁻²ᵏ with
# ρ = π/h + √(π²/h² + 1) = 5.2. The relative error is at most 1.8e-8 for k = 6 (a third of float32's 2⁻²⁴), and 8e-17
# for k = 12. For |d| > 5/2, the difference in `_kl_of_far` is at least a third of its greater term.
FARTHEST = 2.5
QUADRATURE = {np.dtype("float32"): _quadrature(6), np.dtype("float64"): _quadrature(12)}


@custom_jvp
def _sigmoid_difference(x, y):
    """σ(y) - σ(x) = ±σ(more) σ(-less) (1 - e^-|y-x|), where less and more are the lesser and the greater of x and y."""
    d = _minus(y, x)
    less, more = jnp.minimum(x, y), jnp.maximum(x, y)
    e, f = odds_against_again(less), odds_against_again(more)
    # This is σ(more) σ(-less) (1 + e)(1 + f). It equals e, f or 1, so nothing is rounded.
    largest = jnp.where(less > 0, e, jnp.where(more < 0, f, jnp.ones_like(e)))
    size = jnp.abs(d)
    gap = jnp.where(size < 1.5, -exponential_minus_1(-size), 1 - exp(-size))
    return jnp.copysign(largest * gap / ((1 + e) * (1 + f)), d)


# ∂/∂x (σ(y) - σ(x)) = -σ(x) σ(-x), ∂/∂y = σ(y) σ(-y)
def_partials(_sigmoid_difference, lambda x, y: -variance(x), lambda x, y: variance(y))


@custom_jvp
def _weighted_margin(x, y):
    """σ(x) σ(-x) (x - y)"""
    return mul0(_minus(x, y), variance(x))


# ∂/∂x σσ (x - y) = σσ (1 - tanh(x/2) (x - y)), ∂/∂y σσ (x - y) = -σσ
def_partials(
    _weighted_margin,
    lambda x, y: variance(x) - mul0(_weighted_margin(x, y), tanh(x / 2)),
    lambda x, y: -variance(x),
)


def _minus(x, y):
    """x - y, but 0 instead of NaN if both are the same infinity."""
    return jnp.where(x == y, jnp.zeros_like(x), x - y)
