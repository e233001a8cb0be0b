"""Two outcomes, by logits: q = {σ(x), 1 - σ(x)}, with one logit x = log q/(1-q) for each distribution, elementwise.

Formulas are written in terms of e = e^-|x| ≤ 1, the odds of the less probable outcome: nothing overflows or cancels.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.public import public
from jce._jax.rows import elementwise
from jce._numerics.calculus import custom_jvp, def_partials
from jce._numerics.elementary import exp, log1p_unit, one_minus, reused, tanh
from jce._numerics.mul0 import mul0


@public()
def binary_entropy_with_logits(logits: ArrayLike) -> Array:
    """The entropy of {α, 1-α} for each logit, in nats.

    H(α) = α log 1/α + (1-α) log 1/(1-α) with α = σ(logits)

    Example:
      >>> print(jce.binary_entropy_with_logits(jnp.array([0.0, 20.0, -jnp.inf])))
      [6.9314718e-01 4.3284228e-08 0.0000000e+00]

    Args:
      logits: real, any shape: the log-odds log α/(1-α).

    Returns:
      The shape of logits; float32, or float64 if logits is.

    At the boundary:
      At logits of ±∞ the outcome is certain: H = 0, with derivative 0. NaN gives NaN.

    Derivative:
      dH/dx = -x σ(x) σ(-x), in logits' dtype.

    Raises:
      TypeError: an argument is not real.

    Not checked:
      |logit| ≤ 87.3 (708.3 in float64). Beyond it, one outcome has a subnormal probability, which may count as 0.

    See "Conventions" in jce/README.md.
    """
    (x,) = elementwise("binary_entropy_with_logits", logits=logits)
    return _entropy_of_sigmoid(x)


@custom_jvp
def _entropy_of_sigmoid(x):
    e = odds_against(x)
    h = jnp.abs(x) * (e / (1 + e)) + log1p_unit(e)
    # At ±∞, |x| e would be ∞ · 0 = NaN. The select comes last: on a CPU, one loop then computes h for a sum after it.
    return jnp.where(e == 0, jnp.zeros_like(h), h)


# dH/dx = -x σ(x) σ(-x)
def_partials(_entropy_of_sigmoid, lambda x: mul0(-finite(x), variance(x)))


@public()
def binary_cross_entropy_with_logits(alpha: ArrayLike, logits: ArrayLike) -> Array:
    """The cross-entropy of {α, 1-α} and {β, 1-β} for each target probability and logit, in nats.

    H(α, β) = α log 1/β + (1-α) log 1/(1-β) with β = σ(logits)

    Example:
      >>> print(jce.binary_cross_entropy_with_logits(1.0, jnp.array([0.0, 20.0, jnp.inf])))
      [6.9314718e-01 2.0611537e-09 0.0000000e+00]

    Its relative error is small even when the model is confident and correct. As a function of the logits it is minimal
    at β = α.

    Args:
      alpha: real, the target's probabilities. Shapes broadcast.
      logits: real, the model's log β/(1-β).

    Returns:
      The broadcast shape; float32, or float64 if alpha or logits is.

    At the boundary:
      At logits of ±∞, β is exactly 1 or 0. If α = β, then H = 0, with ∂H/∂x = 0. Otherwise H = +∞, with
      ∂H/∂x = β - α. NaN gives NaN.

    Derivative:
      ∂H/∂x = σ(x) - α, ∂H/∂α = -x, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      0 ≤ α ≤ 1. The formula is linear in α, and is evaluated as written even for α outside this range.

    See "Conventions" in jce/README.md.
    """
    alpha, x = elementwise("binary_cross_entropy_with_logits", alpha=alpha, logits=logits)
    return _cross_entropy_of_sigmoid(alpha, x)


@custom_jvp
def _cross_entropy_of_sigmoid(a, x):
    weight, softplus = jnp.where(x < 0, a, one_minus(a)), log1p_unit(odds_against(x))
    # The select comes last. Otherwise XLA on a CPU would store intermediate arrays for a sum that follows.
    return jnp.where(weight == 0, softplus, jnp.abs(x) * weight + softplus)


# ∂H/∂α = -x, ∂H/∂x = σ(x) - α
def_partials(_cross_entropy_of_sigmoid, lambda a, x: -x, lambda a, x: _sigmoid_excess(a, x))


# Factors of the derivatives


@custom_jvp
def _sigmoid_excess(a, x):
    e = odds_against_again(x)
    return jnp.where(x < 0, one_minus(a) * e - a, one_minus(a) - a * e) / (1 + e)


# ∂/∂α (σ(x) - α) = -1, ∂/∂x (σ(x) - α) = σ(x) σ(-x)
def_partials(_sigmoid_excess, lambda a, x: -jnp.ones_like(a), lambda a, x: variance(x))


@custom_jvp
def variance(x):
    """σ(x) σ(-x)."""
    return reused(variance_of_odds(odds_against_again(x)))


def variance_of_odds(e):
    """e/(1 + e)². The square is computed as 1 + e(2 + e): squaring 1 + e would double its rounding error."""
    return e / (1 + e * (2 + e))


# d/dx σ(x) σ(-x) = -σ(x) σ(-x) tanh x/2
def_partials(variance, lambda x: -variance(x) * tanh(x / 2))


def finite(x):
    """x, clipped to a finite number. At ±∞, σ(x) σ(-x) = 0, and 0 · ∞ would be NaN. Beyond ±10⁴, σ(x) σ(-x) has long
    underflowed."""
    return jnp.clip(x, -1e4, 1e4)


def odds_against(x):
    """e^-|x|: the odds of the less probable outcome."""
    return reused(exp(-jnp.abs(x)))


def odds_against_again(x):
    """e^-|x| in another form, for derivatives. In the same form, XLA would store the array so that both the value and
    the derivative could read it."""
    return reused(exp(jnp.minimum(x, -x)))
