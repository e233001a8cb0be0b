"""Two outcomes: p = {α, 1 - α} and q = {β, 1 - β}, with one number for each distribution, elementwise."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.public import public
from jce._jax.rows import elementwise
from jce._numerics.calculus import both_zero, custom_jvp, def_partials, def_tangents, def_twin, over_if_present, ratio
from jce._numerics.deviance import deviance, log_ratio
from jce._numerics.elementary import log, log1p, log_complement, one_minus, raised, unless_negative


@public()
def binary_entropy(alpha: ArrayLike) -> Array:
    """The entropy of {α, 1-α} for each probability α, in nats.

    H(α) = α log 1/α + (1-α) log 1/(1-α)

    Example:
      >>> print(jce.binary_entropy(jnp.array([0.0, 0.5, 1.0])))
      [0.        0.6931472 0.       ]

    The entropy lies between 0 (at α = 0 and α = 1) and log 2 (at α = 1/2).

    Args:
      alpha: real, any shape, probabilities.

    Returns:
      The shape of alpha; float32, or float64 if alpha is.

    At the boundary:
      At α = 0, H = 0 with dH/dα = +∞. At α = 1, H = 0 with dH/dα = -∞. These are the one-sided limits.

    Derivative:
      dH/dα = log (1-α)/α, in alpha's dtype.

    Raises:
      TypeError: an argument is not real.

    Not checked:
      0 ≤ α ≤ 1. Outside this range the result is NaN, from a logarithm.

    See "Conventions" in jce/README.md.
    """
    (alpha,) = elementwise("binary_entropy", alpha=alpha)
    return _entropy(alpha)


@custom_jvp
def _entropy(a):
    return _cross_entropy(a, a)


# dH(α)/dα = log (1-α)/α
def_partials(_entropy, lambda a: _log_odds_against(jnp.full_like(a, 0.5), a))


@public()
def binary_cross_entropy(alpha: ArrayLike, beta: ArrayLike) -> Array:
    """The cross-entropy of {α, 1-α} and {β, 1-β} for each pair of probabilities, in nats.

    H(α, β) = α log 1/β + (1-α) log 1/(1-β)

    Example:
      >>> print(jce.binary_cross_entropy(1.0, 0.25), jax.grad(jce.binary_cross_entropy, 1)(1.0, 0.25))
      1.3862944 -4.0

    As a function of β it is minimal at β = α, where it is H(α). It is not symmetric.

    Args:
      alpha: real, the target's probabilities. Shapes broadcast.
      beta: real, the model's probabilities.

    Returns:
      The broadcast shape; float32, or float64 if alpha or beta is.

    At the boundary:
      A term of weight 0 is 0. So H = 0 at α = β = 0, with ∂H/∂β = +1, and at α = β = 1, with ∂H/∂β = -1. At both,
      ∂H/∂α = 0. If β is 0 or 1 and α differs from it, H and the derivatives below are infinite.

    Derivative:
      ∂H/∂β = (β-α)/(β(1-β)), ∂H/∂α = log (1-β)/β, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      0 ≤ α, β ≤ 1. A β outside this range gives NaN, from a logarithm. The formula is linear in α, and is
      evaluated as written even for α outside this range.

    See "Conventions" in jce/README.md.
    """
    alpha, beta = elementwise("binary_cross_entropy", alpha=alpha, beta=beta)
    return _cross_entropy(alpha, beta)


@custom_jvp
def _cross_entropy(a, b):
    # If α = β = 0 or α = β = 1, the impossible outcome would contribute 0 log 1/0 = 0 · ∞ = NaN, so h is set to 0.
    h = a * -log(b) + one_minus(a) * -log_complement(b)
    return jnp.where(_agree(a, b), jnp.zeros_like(h), h)


# ∂H/∂α = log (1-β)/β, ∂H/∂β = (β-α)/(β(1-β))
def_partials(_cross_entropy, lambda a, b: _log_odds_against(a, b), lambda a, b: _score(a, b))


@public()
def binary_kl_divergence(alpha: ArrayLike, beta: ArrayLike) -> Array:
    """KL(α‖β) of {α, 1-α} and {β, 1-β} for each pair of probabilities, in nats.

    KL(α‖β) = α log α/β + (1-α) log (1-α)/(1-β)

    Example:
      >>> print(jce.binary_kl_divergence(0.5, jnp.array([0.25, 0.5, 1.0])))
      [0.14384104 0.                inf]

    Rounding never makes it negative, and it is 0 only if α = β or if it underflows. It is not symmetric.

    Args:
      alpha: real, the target's probabilities. Shapes broadcast.
      beta: real, the model's probabilities.

    Returns:
      The broadcast shape; float32, or float64 if alpha or beta is.

    At the boundary:
      KL = 0 at α = β = 0, with ∂KL/∂β = +1, and at α = β = 1, with ∂KL/∂β = -1. At both, ∂KL/∂α = 0. If β differs from
      α, ∂KL/∂α is -∞ at α = 0 and +∞ at α = 1, the one-sided limits. If β is 0 or 1 and α differs from it, KL
      and the derivatives below are infinite.

    Derivative:
      ∂KL/∂β = (β-α)/(β(1-β)), ∂KL/∂α = log α(1-β)/((1-α)β), each in its argument's dtype.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      0 ≤ α, β ≤ 1. Outside this range the result is NaN, from a logarithm.

    See "Conventions" in jce/README.md.
    """
    alpha, beta = elementwise("binary_kl_divergence", alpha=alpha, beta=beta)
    return _kl_divergence(alpha, beta)


@custom_jvp
def _kl_divergence(a, b):
    deviances = deviance(a, b, a - b) + deviance(one_minus(a), one_minus(b), b - a)
    return unless_negative(_least_probable(a, b), deviances)


# ∂KL/∂α = log α(1-β)/((1-α)β), ∂KL/∂β = (β-α)/(β(1-β))
def_partials(_kl_divergence, lambda a, b: _log_odds_ratio(a, b), lambda a, b: _score(a, b))


# Factors of the derivatives


@custom_jvp
def _score(a, b):
    c = one_minus(b)
    p, q = raised(a, b)
    score = jnp.where(_agree(a, b), 1 - 2 * b, (q - p) / jnp.abs(q * c))
    return unless_negative(jnp.minimum(b, c), score)


# (β-α)/(β(1-β)) = (1-α)/(1-β) - α/β
def_twin(_score, lambda a, b: ratio(one_minus(a), one_minus(b)) - ratio(a, b))


@custom_jvp
def _log_odds_against(a, b):
    # log (1-β)/β = ±log(1 + |1-2β|/min(β, 1-β)). Near β = 1/2, |1-2β| is small and exact, so no digits are lost.
    smaller = jnp.minimum(b, one_minus(b))
    log_odds = log1p(jnp.abs(1 - 2 * b) / jnp.where(smaller == 0, jnp.ones_like(b), smaller))
    at_end = jnp.where(a == b, jnp.zeros_like(b), jnp.inf)  # β = 0 or 1
    log_odds = jnp.where(smaller == 0, at_end, log_odds)
    return jnp.where(b < 0.5, log_odds, 0 - log_odds)


# ∂/∂β log (1-β)/β = -1/(β(1-β))
def_tangents(_log_odds_against, lambda t, a, b: jnp.zeros_like(t), lambda t, a, b: -_times_precision(t, a, b))


@custom_jvp
def _log_odds_ratio(a, b):
    p, q = raised(a, b)
    log_odds = log_ratio(p, q, p - q) - log_ratio(one_minus(a), one_minus(b), b - a)
    return unless_negative(_least_probable(a, b), log_odds)


# ∂/∂α log α(1-β)/((1-α)β) = 1/(α(1-α)), ∂/∂β = -1/(β(1-β))
def_tangents(_log_odds_ratio, lambda t, a, b: _times_precision(t, b, a), lambda t, a, b: -_times_precision(t, a, b))


def _times_precision(t, a, b):
    """t/β + t/(1-β) = t/(β(1-β)), without the term for an outcome whose probability is 0 in both distributions."""
    return over_if_present(t, a, b) + over_if_present(t, one_minus(a), one_minus(b))


def _least_probable(a, b):
    """min(α, 1-α, β, 1-β)."""
    return jnp.minimum(jnp.minimum(a, b), one_minus(jnp.maximum(a, b)))


def _agree(a, b):
    """Whether α = β = 0 or α = β = 1: one outcome has probability 0 in both distributions."""
    return both_zero(a, b) | ((a == 1) & (b == 1))
