"""An accelerator's way: one reduction with several results reads a row once, and may select.

An accelerator is limited by memory bandwidth alone. m, s and the entropy's sum come from one reading of x, so that they
agree in its rounding and nothing cancels between them. At a label a GPU gathers, which reads next to nothing; a TPU
masks, during a reading for another sum.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from jce._numerics.calculus import custom_jvp
from jce._numerics.elementary import exp
from jce._numerics.mul0 import mul0
from jce._softmax.sums import Normalizer, OffLabel, Sums
from jce._softmax.way import Way, off_maximum, unless_no_class

FAR = 1e4  # so far below the maximum exp is 0, in float64 too (from 745 on)


@dataclasses.dataclass(frozen=True)
class Reduction(Way):
    def maximum(self, x):
        return self.sums(x).m

    def sums(self, x):
        """m, s and t; s is NaN where m is ±∞ or NaN."""
        m, s, t = _sums_here(x, self)
        if self.mesh_axis is not None:
            here, m = m, lax.pmax(lax.stop_gradient(m), self.mesh_axis)
            # Each device whose own maximum is less than 0.5 below m leaves its maximal class out of s. Where several
            # do, `off_maximum` repairs s, since each of these classes has e > e^-0.5 = .61 > .6.
            depth = jnp.minimum(jnp.maximum(m, jnp.finfo(m.dtype).min) - lax.stop_gradient(here), FAR)
            e, z = exp(-depth), 1 + s
            t, s, z = map(self.over_devices, (e * (t + depth * z), e * jnp.where(depth < 0.5, s, z), e * z))
            s = jnp.maximum(s, off_maximum(z))
        return Sums(m, s + (m - m), t)

    def off_label(self, labels, x):
        m, s, _ = self.sums(x)
        m = unless_no_class(m, labels, x, self)
        d = m - self.at_label(x, labels)
        # Where s < 1/2, only the maximal class has d < log 2 = 0.69: so a d below 1/2 is rounding, and set to 0.
        d = jnp.where(jnp.maximum(s, d) < 0.5, d - lax.stop_gradient(d), d)
        return OffLabel(m, s + (1 - exp(-d)), d)

    def at_label(self, x, labels):
        return self.at(x, self.local(labels, x))

    def depth_off_label(self, x, off):
        # In the sum of the one reading a class that dominates counts exactly 1, so its depth must be 0 here too.
        return Normalizer(off.m, off.z - 1).depth_and_dominant(x, off.m, self)[0]


@dataclasses.dataclass(frozen=True)
class MaskedReduction(Reduction):
    """A TPU's way. Its gathers are slow, so it masks. XLA makes one pass of two sums there if they share m, so `again`
    doesn't disguise m."""

    def again(self, m, s):
        return m

    def at_label(self, x, labels):
        return self.sum(jnp.where(self.is_at(x, self.local(labels, x)), x, jnp.zeros_like(x)))


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sums_here(x, way):
    """m, s and t of this device's classes.

    To merge two sets of classes, the one with the lower maximum is rescaled to the other's, and its maximal class, left
    out before, is added to s and t. All terms are positive, so nothing cancels.

    `merged` calls no function that is jitted, as `jnp.where` is: XLA crashes at such a call in a reduction of which no
    result is used (jaxlib 0.10 to 0.12).
    """

    def merged(a, b):
        a_is_first = a[0] >= b[0]
        m, (s, t) = jnp.maximum(a[0], b[0]), (lax.select(a_is_first, *pair) for pair in zip(a[1:], b[1:], strict=True))
        m_b, s_b, t_b = (lax.select(a_is_first, *pair) for pair in zip(b, a, strict=True))
        depth = lax.select(m_b == -jnp.inf, jnp.full_like(m, FAR), jnp.minimum(m - m_b, FAR))
        e, z_b = exp(-depth), 1 + s_b
        return m, s + e * z_b, t + e * (t_b + depth * z_b)

    first = tuple(jnp.asarray(number, x.dtype) for number in (-jnp.inf, 0, 0))
    sums = lax.reduce((x, jnp.zeros_like(x), jnp.zeros_like(x)), first, merged, (x.ndim + way.axis,))
    # Without the barrier XLA drops results that one caller doesn't use, and then computes the rest twice for another
    # caller that uses all.
    return tuple(lax.optimization_barrier(tuple(sums)))


# For a constant m, ds = Σ eᵢdxᵢ and dt = Σ eᵢ (m - xᵢ - 1) dxᵢ, over all classes.
@_sums_here.defjvp
def _sums_here_rule(way, primals, tangents):
    (x,), (dx,) = primals, tangents
    m, s, t = _sums_here(x, way)
    finite = lax.stop_gradient(jnp.maximum(m, jnp.finfo(m.dtype).min))
    depth = jnp.minimum(way.column(finite) - x, FAR)
    slopes = exp(-depth), exp(-depth) * (depth - 1)
    return (m, s, t), (jnp.zeros_like(m), *(way.reduce(jnp.sum, mul0(slope, dx)) for slope in slopes))
