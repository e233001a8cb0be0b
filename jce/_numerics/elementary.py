"""Elementary functions: XLA's at their highest accuracy, and our own if XLA's are too inaccurate or too slow.

Ours compute the leading terms exactly and add the rest as a short series or a correction, so that nothing cancels.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

# By default a TPU approximates these, which leaves errors of 1e-4 in a loss. On a CPU and a GPU nothing changes.
exp, log, tanh = (functools.partial(f, accuracy=lax.AccuracyMode.HIGHEST) for f in (lax.exp, lax.log, lax.tanh))

# Coefficients of (atanh v / v - 1) / v² as a polynomial in v² for |v| ≤ 1/2, highest power first. These are Chebyshev
# approximations, with relative errors of 2⁻²⁷ and 2⁻⁵⁵ before the coefficients were rounded. At most a quarter of a
# result comes from this polynomial: at v = 1/2 it is .394, and v (1 + v) .394 = .296 of 1.296.
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

# The last power that is kept of the series for e^d - 1 - d, |d| < 3/2. At d = -3/2 the next term is below 2⁻²⁷ (2⁻⁶⁰ in
# float64) of the sum. Beyond 3/2, little cancels in e^d - 1 - d itself: at -3/2 it is .72, from terms up to 1.5, and at
# 3/2 it is 1.98, from terms up to 4.48.
LAST_POWER = {np.dtype("float32"): 13, np.dtype("float64"): 22}


def atanh_tail(v):
    """(atanh v / v - 1) / v² = 1/3 + v²/5 + v⁴/7 + …, for |v| ≤ 1/2."""
    return functools.reduce(lambda s, c: s * (v * v) + c, ATANH_TAIL[np.dtype(v.dtype)])


def log1p_unit(e: Array) -> Array:
    """log(1 + e) for 0 ≤ e ≤ 1, within 1.1 ulps. XLA's log1p is off by up to 2.5 ulps, and slower on a CPU. Not
    differentiable.

    log(1 + e) = 2 atanh v = 2v + 2v³T with v = e/(2 + e), and 2v = e - ev. So it is e minus a correction v (e - 2v²T).
    The correction is at most 1 - log 2 = 0.31 of e, so the rounding of v has little weight.
    """
    v = reused(e / (2 + e))  # a subnormal v is flushed to 0, but then log(1 + e) rounds to e
    return e - v * (e - 2 * (v * v) * atanh_tail(v))


@jax.custom_jvp
def log1p(s: Array) -> Array:
    """log(1 + s) for 0 ≤ s < ∞, within 1.7 ulps. XLA's log1p is off by up to 2.5 ulps, and by more in float64."""
    return log_complement(-s)


log1p.defjvp(lambda primals, tangents: (log1p(*primals), tangents[0] / (1 + primals[0])))


@jax.custom_jvp
def one_minus(a):
    """1 - α, for the rounded α. If α is a product uv, XLA would contract 1 - uv to a fused multiply-add, which gives
    ±3e-8 instead of 0 where uv rounds to 1. The maximum, which is always α, prevents this."""
    return 1 - jnp.maximum(a, a - jnp.finfo(a.dtype).max)


one_minus.defjvp(lambda primals, tangents: (one_minus(*primals), -tangents[0]))


def reused(x: Array) -> Array:
    """x, which must be > -∞, clamped. On a CPU, XLA stores a quotient or an exponential that is used twice, but not if
    it is clamped."""
    return at_least(jnp.finfo(x.dtype).min, x)


def at_least(least: ArrayLike, x: Array) -> Array:
    """max(x, least), and NaN where x is NaN. XLA may drop a NaN in a maximum (`classes.py`), but not in a clamp.

    On a CPU, XLA can't fuse a clamp into a sum. So use it in formulas that end in a select, which can't be fused
    either.
    """
    return lax.clamp(jnp.asarray(least, x.dtype), x, jnp.asarray(jnp.inf, x.dtype))


def unless_negative(x, result):
    """The result, but NaN where x < 0."""
    return jnp.where(x < 0, jnp.full_like(x, jnp.nan), result)


def raising(p, q):
    """A power of 2 by which to multiply p and q; 1 unless both are below 1. With this factor, their products with small
    weights don't underflow. Their products with a logarithm, which is at most 745 < 2¹¹, don't overflow, since
    2^(maxexp - 12) · 2¹¹ < 2^maxexp."""
    return jnp.where(jnp.maximum(p, q) < 1, 2.0 ** (jnp.finfo(p.dtype).maxexp - 12), 1.0).astype(p.dtype)


def raised(p, q):
    """p and q times `raising`. Without the factor, the difference of the smallest numbers would be subnormal, and XLA
    would flush it to 0."""
    scale = raising(p, q)
    return p * scale, q * scale


def log_complement(b):
    """log(1 - β), from the rounded 1 - β and its rounding error. XLA's log1p is off by up to 128 ulps in float64."""
    c = one_minus(b)
    return log(c) + ((1 - c) - b) / jnp.maximum(c, jnp.finfo(b.dtype).tiny)


def exponential_minus_1(d: Array) -> Array:
    """e^d - 1 for |d| < 3/2. XLA's expm1 is less accurate: it is off by up to 6 ulps. Not differentiable."""
    return d + exponential_tail(d)


def exponential_tail(d):
    """e^d - 1 - d = d²/2! + d³/3! + …, for |d| < 3/2."""
    powers = range(LAST_POWER[np.dtype(d.dtype)], 1, -1)
    return d * d * functools.reduce(lambda s, k: s * d + 1 / math.factorial(k), powers, jnp.zeros_like(d))


def two_sum(a, b):
    """The rounded a + b, and its rounding error. Their sum is exactly a + b (Knuth, TAOCP 2, §4.2.2, theorem B)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)
