"""log p/q, and p log p/q - p + q, accurate also where p ≈ q: the two numbers that every divergence is made of.

With d = p - q, v = d / (p + q) and T = 1/3 + v²/5 + v⁴/7 + …, which is (atanh v / v - 1) / v²,

    log p/q           = 2 atanh v = 2v (1 + v² T)
    p log p/q - p + q = d v (1 + v (1 + v) T)

In the second, 2p = (p + q)(1 + v) is put in, so that one factor carries the magnitude and the other is near 1. Where
|v| < 1/2, d is exact and nothing else cancels. It is the deviance of C. Loader, Fast and Accurate Computation of
Binomial Probabilities (2000). The difference d is an argument of its own, because the binary functions know
(1 - α) - (1 - β) = β - α better than the rounded 1 - α and 1 - β do.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

# T as a polynomial in v², |v| ≤ 1/2, highest power first: Chebyshev approximations of relative error 2⁻²⁷ and 2⁻⁵⁵,
# before the coefficients are rounded. T weighs at most a tenth in the logarithm and a quarter in the deviance.
ATANH_TAIL = {
    np.dtype("float32"): (
        0.1562916538185637,
        0.040916230718241735,
        0.09751940865741168,
        0.11050830395223991,
        0.14288286042811285,
        0.19999959336215828,
        0.33333333437307106,
    ),
    np.dtype("float64"): (
        0.21098097885975797,
        -0.14450491183414468,
        0.13557903913692299,
        0.012292448728540531,
        0.05441915418234587,
        0.05160769881147162,
        0.05893099692590042,
        0.06665886352701884,
        0.07692345940270638,
        0.09090907881509189,
        0.11111111133938968,
        0.14285714285490106,
        0.20000000000000864,
        0.3333333333333333,
    ),
}


def log_ratio(p: Array, q: Array, d: Array) -> Array:
    """log p/q for p, q ≥ 0 and d = p - q; ±∞ where one of them is 0, and 0 where both are. Not differentiable."""
    near, v, log_r = _contrast_or_log_ratio(p, q, d)
    return jnp.where(near, 2 * v * (1 + v * v * _atanh_tail(v)), log_r)


def deviance(p: Array, q: Array, d: Array) -> Array:
    """p log p/q - p + q ≥ 0, for p, q ≥ 0 and d = p - q; q where p = 0, +∞ where only q = 0. Not differentiable."""
    near, v, log_r = _contrast_or_log_ratio(p, q, d)
    far = p * jnp.maximum(log_r, jnp.finfo(p.dtype).min) - d  # at p = 0 the logarithm is -∞, and 0 · min = 0
    return jnp.where(near, d * v * (1 + v * (1 + v) * _atanh_tail(v)), far)


def _contrast_or_log_ratio(p, q, d):
    """|v| < 1/2, v where that holds, log p/q where it doesn't: one division serves both."""
    q = jnp.abs(q)  # -0 is 0 too
    s = jnp.maximum(p + q, jnp.finfo(p.dtype).tiny)
    near = 2 * jnp.abs(d) < s
    # Numbers that are no probabilities may have a quotient beyond the float range: 2ᵏ p/q or p/(2ᵏ q) is within it.
    k = -jnp.finfo(p.dtype).minexp
    over, under = p * 2.0 ** -(k // 2) > q * 2.0 ** (k // 2), p * 2.0 ** (k // 2) < q * 2.0 ** -(k // 2)
    numerator, denominator = p * jnp.where(under, 2.0**k, 1), q * jnp.where(over, 2.0**k, 1)
    x = jnp.where(near, d, numerator) / jnp.where(near, s, denominator)
    return near, x, jnp.log(x) + k * math.log(2) * jnp.where(over, 1, jnp.where(under, -1, 0))


def _atanh_tail(v):
    """(atanh v / v - 1) / v² = 1/3 + v²/5 + v⁴/7 + …, for |v| ≤ 1/2."""
    return functools.reduce(lambda s, c: s * (v * v) + c, ATANH_TAIL[np.dtype(v.dtype)])
