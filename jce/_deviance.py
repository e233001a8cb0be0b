"""log p/q, and p log p/q - p + q, accurate also where p ≈ q: the two numbers that every divergence is made of.

With d = p - q, v = d / (p + q) and T = 1/3 + v²/5 + v⁴/7 + …, which is (atanh v / v - 1) / v²,

    log p/q           = 2 atanh v = 2v (1 + v² T)
    p log p/q - p + q = d v (1 + v (1 + v) T)

In the second, 2p = (p + q)(1 + v) is put in, so that one factor carries the magnitude and the other is near 1. Where
|v| ≤ 1/3, d is exact, up to 1/2 it is rounded once, and nothing else cancels. It is the deviance of C. Loader, Fast and
Accurate Computation of Binomial Probabilities (2000). The difference d is an argument of its own, because the binary
functions know (1 - α) - (1 - β) = β - α better than the rounded 1 - α and 1 - β do.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from jce._elementary import atanh_tail, exponential_minus_1, exponential_tail, log, reused
from jce._mul0 import mul0


def log_ratio(p: Array, q: Array, d: Array) -> Array:
    """log p/q for p, q ≥ 0 and d = p - q; ±∞ where one of them is 0, 0 where both are. Not differentiable."""
    near, v, log_r = _contrast_and_log_ratio(p, q, d)
    return jnp.where(near, 2 * v * (1 + v * v * atanh_tail(v)), log_r)


def deviance(p: Array, q: Array, d: Array, left_out: Array | None = None) -> Array:
    """p log p/q - p + q ≥ 0, for p, q ≥ 0 and d = p - q; q where p = 0, +∞ where only q = 0. Not differentiable.

    Or p log p/q less another number than p - q, which is the same where |v| < 1/2: where q < 3p.
    """
    near, v, log_r = _contrast_and_log_ratio(p, q, d)
    log_r = jnp.maximum(log_r, jnp.finfo(p.dtype).min)  # at p = 0 the logarithm is -∞, and 0 · min = 0
    far = p * log_r - (d if left_out is None else left_out)
    return jnp.where(near, d * v * (1 + v * (1 + v) * atanh_tail(v)), far)


def _contrast_and_log_ratio(p, q, d):
    """|v| < 1/2, v, and log p/q by the quotient, which is for where v is beyond."""
    v = reused(d / jnp.maximum(p + q, jnp.finfo(p.dtype).tiny))
    rises = p < q
    less, more = jnp.where(rises, p, q), jnp.where(rises, q, p)
    # Numbers that are no probabilities may have a quotient below the float range: 2ᵏ less/more is within it.
    k = -jnp.finfo(p.dtype).minexp
    under = less * 2.0 ** (k // 2) < more * 2.0 ** -(k // 2)
    log_r = log(less * jnp.where(under, 2.0**k, 1) / more) - jnp.where(under, k * math.log(2), 0)
    return jnp.abs(v) < 0.5, v, jnp.where(rises, log_r, -log_r)


def deviance_from_log(p: Array, q: Array, delta: Array) -> Array:
    """q - p - pδ ≥ 0, for δ = log q/p: the deviance once more; q where p = 0, +∞ where only q = 0. Not differentiable.

    Where |δ| < 3/2 it is p (δ²/2! + δ³/3! + …), in which nothing cancels but δ's own error.
    """
    return jnp.where(jnp.abs(delta) < 1.5, p * exponential_tail(delta), q - p - mul0(delta, p))


def difference_from_log(p: Array, q: Array, delta: Array) -> Array:
    """q - p, for δ = log q/p: where |δ| < 3/2 it is ±min(p, q) (e^|δ| - 1). Not differentiable.

    Of q and p, for -δ, it is the same to the bit but for its sign.
    """
    size = jnp.abs(delta)
    return jnp.where(size < 1.5, jnp.copysign(jnp.minimum(p, q) * exponential_minus_1(size), delta), q - p)
