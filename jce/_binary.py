"""The two-outcome case, p = {α, 1 - α} and q = {β, 1 - β}: one number for a distribution, elementwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._arguments import elementwise, public
from jce._calculus import both_zero, def_partials, def_twin, ratio, reciprocal
from jce._deviance import deviance, log_ratio
from jce._mul0 import mul0


@public()
def binary_entropy(alpha: ArrayLike) -> Array:
    """TODO"""
    (alpha,) = elementwise("binary_entropy", alpha=alpha)
    return _entropy(alpha)


@jax.custom_jvp
def _entropy(a):
    return _cross_entropy(a, a)


@public()
def binary_cross_entropy(alpha: ArrayLike, beta: ArrayLike) -> Array:
    """TODO"""
    alpha, beta = elementwise("binary_cross_entropy", alpha=alpha, beta=beta)
    return _cross_entropy(alpha, beta)


@jax.custom_jvp
def _cross_entropy(a, b):
    return mul0(-jnp.log(b), a) + mul0(-_log_complement(b), 1 - a)


@public()
def binary_kl_divergence(alpha: ArrayLike, beta: ArrayLike) -> Array:
    """TODO"""
    alpha, beta = elementwise("binary_kl_divergence", alpha=alpha, beta=beta)
    return _kl_divergence(alpha, beta)


@jax.custom_jvp
def _kl_divergence(a, b):
    return deviance(a, b, a - b) + deviance(1 - a, 1 - b, b - a)


# Their derivatives


@jax.custom_jvp
def _score(a, b):
    return jnp.where(_agree(a, b), 1 - 2 * b, (b - a) / jnp.abs(b * (1 - b)))


@jax.custom_jvp
def _log_odds_against(a, b):
    # |1 - 2β| is exact where it is small, and log1p of a positive number keeps its digits.
    b = jnp.abs(b)
    log_odds = jnp.log1p(jnp.abs(1 - 2 * b) / jnp.minimum(b, 1 - b))
    return jnp.where(_agree(a, b), jnp.zeros_like(b), jnp.where(b < 0.5, log_odds, -log_odds))


@jax.custom_jvp
def _log_odds_ratio(a, b):
    return log_ratio(a, b, a - b) - log_ratio(1 - a, 1 - b, b - a)


def _agree(a, b):
    """α = β = 0 or α = β = 1: one outcome is absent from both distributions."""
    return both_zero(a, b) | both_zero(1 - a, 1 - b)


def _precision(a, b):
    """1/β + 1/(1-β) = 1/(β(1-β)), without the term of an outcome that is absent."""
    return reciprocal(a, b) + reciprocal(1 - a, 1 - b)


# dH(α)/dα = log (1-α)/α
def_partials(_entropy, lambda a: _log_odds_against(jnp.full_like(a, 0.5), a))
# ∂H/∂α = log (1-β)/β, ∂H/∂β = (β-α)/(β(1-β))
def_partials(_cross_entropy, _log_odds_against, _score)
# ∂KL/∂α = log α(1-β)/((1-α)β), ∂KL/∂β = (β-α)/(β(1-β))
def_partials(_kl_divergence, _log_odds_ratio, _score)
# (β-α)/(β(1-β)) = (1-α)/(1-β) - α/β
def_twin(_score, lambda a, b: ratio(1 - a, 1 - b) - ratio(a, b))
# ∂/∂β log (1-β)/β = -1/(β(1-β))
def_partials(_log_odds_against, lambda a, b: jnp.zeros_like(a), lambda a, b: -_precision(a, b))
# ∂/∂α log α(1-β)/((1-α)β) = 1/(α(1-α)), ∂/∂β = -1/(β(1-β))
def_partials(_log_odds_ratio, lambda a, b: _precision(b, a), lambda a, b: -_precision(a, b))


def _log_complement(b):
    """log(1 - β), from the rounded 1 - β and what the rounding lost. log1p is further off, up to 128 ulp in float64."""
    finfo = jnp.finfo(b.dtype)
    c = lax.reduce_precision(1 - b, finfo.nexp, finfo.nmant)  # or XLA takes 1 - (1 - β) for β
    return jnp.log(c) + ((1 - c) - b) / jnp.maximum(c, finfo.tiny)
