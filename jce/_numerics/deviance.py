"""log p/q, and the deviance p log p/q - p + q, accurate even if p ≈ q. Every divergence is built from these two.

With d = p - q, v = d / (p + q) and T = 1/3 + v²/5 + v⁴/7 + …, which is (atanh v / v - 1) / v²,

    log p/q           = 2 atanh v = 2v (1 + v² T)
    p log p/q - p + q = d v (1 + v (1 + v) T)

The second formula follows from 2p = (p + q)(1 + v). Its factor d v carries the magnitude, and the other factor is near
1. For |v| ≤ 1/3 (p and q within a factor of 2), d = p - q is exact. Up to |v| = 1/2 it is rounded once, and nothing
else cancels. This is the deviance of C. Loader, Fast and Accurate Computation of Binomial Probabilities (2000). The
difference d is a separate argument because the binary functions can compute (1 - α) - (1 - β) as β - α, which is more
accurate than the difference of the rounded 1 - α and 1 - β.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from jce._numerics.elementary import at_least, atanh_tail, exponential_minus_1, exponential_tail, log, reused
from jce._numerics.mul0 import mul0


def log_ratio(p: Array, q: Array, d: Array) -> Array:
    """log p/q for p, q ≥ 0 and d = p - q; ±∞ where only one of them is 0, and 0 where both are. Not differentiable."""
    near, v, log_r = _contrast_and_log_ratio(p, q, d)
    return jnp.where(near, 2 * v * (1 + v * v * atanh_tail(v)), log_r)


def deviance(p: Array, q: Array, d: Array, left_out: Array | None = None) -> Array:
    """p log p/q - p + q ≥ 0, for p, q ≥ 0 and d = p - q; q where p = 0, +∞ where only q = 0. Not differentiable.

    If `left_out` is given, the result is p log p/q - left_out. It must equal p - q where |v| < 1/2 (for
    q > p this means q < 3p), since the formula for this range subtracts p - q.
    """
    near, v, log_r = _contrast_and_log_ratio(p, q, d)
    log_r = at_least(jnp.finfo(p.dtype).min, log_r)  # at p = 0, 0 · -∞ would be NaN
    far = p * log_r - (d if left_out is None else left_out)
    return jnp.where(near, d * v * (1 + v * (1 + v) * atanh_tail(v)), far)


def _contrast_and_log_ratio(p, q, d):
    """Returns whether |v| < 1/2, v itself, and log p/q, computed from the quotient p/q, for use where |v| ≥ 1/2."""
    v = reused(d / jnp.maximum(p + q, jnp.finfo(p.dtype).tiny))
    rises = p < q
    less, more = jnp.where(rises, p, q), jnp.where(rises, q, p)
    # The quotient of two floats may underflow, and its logarithm would then be -∞. If so, it is scaled by 2ᵏ.
    k = -jnp.finfo(p.dtype).minexp
    under = less * 2.0 ** (k // 2) < more * 2.0 ** -(k // 2)
    log_r = log(less * jnp.where(under, 2.0**k, 1) / more) - jnp.where(under, k * math.log(2), 0)
    return jnp.abs(v) < 0.5, v, jnp.where(rises, log_r, -log_r)


def deviance_from_log(p: Array, q: Array, delta: Array) -> Array:
    """q - p - pδ ≥ 0, the deviance from δ = log q/p; q where p = 0, +∞ where only q = 0. Not differentiable.

    Where |δ| < 3/2 it is p (δ²/2! + δ³/3! + …), which is as accurate as δ.
    """
    return jnp.where(jnp.abs(delta) < 1.5, p * exponential_tail(delta), q - p - mul0(delta, p))


def difference_from_log(p: Array, q: Array, delta: Array) -> Array:
    """q - p from δ = log q/p: where |δ| < 3/2 it is ±min(p, q) (e^|δ| - 1). Not differentiable.

    Exchanging p and q, with -δ, gives exactly the negative.
    """
    size = jnp.abs(delta)
    return jnp.where(size < 1.5, jnp.copysign(jnp.minimum(p, q) * exponential_minus_1(size), delta), q - p)
