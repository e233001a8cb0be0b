"""KL(p‖q) = Σ pᵢ log pᵢ/qᵢ, and its form for numbers that don't sum to 1, Σ (pᵢ log pᵢ/qᵢ - pᵢ + qᵢ)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._arguments import distributions, public
from jce._calculus import both_zero, def_partials, def_twin, directional_derivative, ratio, reciprocal
from jce._deviance import deviance, log_ratio


@public("axis")
def kl_divergence(p: ArrayLike, q: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """TODO"""
    (p, q), axis = distributions("kl_divergence", axis, where, p=p, q=q)
    return _kl(p, q, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl(p, q, axis):
    return deviance(p, q, p - q).sum(axis) + _sum_of_differences(p, q, axis)


# ∂/∂p p log p/q = log p/q + 1, ∂/∂q p log p/q = -p/q
def _kl_rule(axis, primals, tangents):
    tangent = directional_derivative(
        primals,
        tangents,
        lambda p, q: jnp.where(both_zero(p, q), jnp.zeros_like(p), _log_ratio(p, q) + 1),
        lambda p, q: -ratio(p, q),
    )
    value = _kl(*primals, axis)
    return value, jnp.zeros_like(value) if tangent is None else tangent.sum(axis)


_kl.defjvp(_kl_rule, symbolic_zeros=True)


@public("axis")
def generalized_kl_divergence(p: ArrayLike, q: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """TODO"""
    (p, q), axis = distributions("generalized_kl_divergence", axis, where, p=p, q=q)
    return _deviance(p, q).sum(axis)


@jax.custom_jvp
def _deviance(p, q):
    return deviance(p, q, p - q)


@jax.custom_jvp
def _log_ratio(p, q):
    return log_ratio(p, q, p - q)


@jax.custom_jvp
def _excess(p, q):
    return jnp.where(both_zero(p, q), jnp.ones_like(q), (q - p) / jnp.abs(q))


# ∂/∂p (p log p/q - p + q) = log p/q, ∂/∂q (p log p/q - p + q) = (q - p)/q
def_partials(_deviance, _log_ratio, _excess)
# ∂/∂p log p/q = 1/p, ∂/∂q log p/q = -1/q
def_partials(_log_ratio, lambda p, q: reciprocal(q, p), lambda p, q: -reciprocal(p, q))
# (q - p)/q = 1 - p/q
def_twin(_excess, lambda p, q: -ratio(p, q))


def _sum_of_differences(p, q, axis):
    """Σ (p - q), to an ulp even where it is the little that rounding left of 1 - 1: a sum of exact two-float numbers."""
    high, low = _two_sum(p, -q)
    zero = jnp.zeros((), p.dtype)
    high, low = lax.reduce((high, low), (zero, zero), _add, (high.ndim + axis,))
    return high + low


def _add(a, b):
    high, low = _two_sum(a[0], b[0])
    return high, low + (a[1] + b[1])


def _two_sum(a, b):
    """The rounded a + b, and what the rounding lost (Knuth, TAOCP 2, §4.2.2, theorem B)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)
