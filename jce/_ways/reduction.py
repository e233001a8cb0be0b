"""An accelerator's way: one reduction with several results reads a row once, and may select.

An accelerator only waits for memory. m, s and the entropy's sum are of one reading of x, so that nothing cancels
between them. A TPU masks while it reads for another sum, but gathers slowly; a GPU gathers with hardly a reading.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from jce._calculus import custom_jvp
from jce._elementary import exp
from jce._mul0 import mul0
from jce._ways.way import Normalizer, OffLabel, Sums, Way, off_maximum, unless_no_class

FAR = 1e4  # how far below the maximum exp is 0, in float64 too


@dataclasses.dataclass(frozen=True)
class Reduction(Way):
    def maximum(self, x):
        return self.sums(x).m

    def again(self, m, s):
        # A TPU's passes share these, for then two sums of it are one pass.
        return lax.platform_dependent(m, s, tpu=lambda m, s: m, default=super().again)

    def sums(self, x):
        """NaN where m is no number."""
        m, s, t = _sums_here(x, self)
        if self.mesh_axis is not None:
            here, m = m, lax.pmax(lax.stop_gradient(m), self.mesh_axis)
            depth = jnp.minimum(jnp.maximum(m, jnp.finfo(m.dtype).min) - lax.stop_gradient(here), FAR)
            e, z = exp(-depth), 1 + s
            t, s, z = map(self.over_devices, (e * (t + depth * z), e * jnp.where(depth < 0.5, s, z), e * z))
            s = jnp.maximum(s, off_maximum(z))
        return Sums(m, s + (m - m), t)

    def off_label(self, labels, x):
        m, s, _ = self.sums(x)
        m = unless_no_class(m, labels, x, self)
        d = m - self.at_label(x, self.local(labels, x))
        # Where s < 1/2, only the maximal class has d < log 2.
        d = jnp.where(jnp.maximum(s, d) < 0.5, d - lax.stop_gradient(d), d)
        return OffLabel(m, s + (1 - exp(-d)), d)

    def at_label(self, x, y):
        """x at a local label."""
        return lax.platform_dependent(x, y, tpu=self.at_by_mask, default=self.at)

    def at_by_mask(self, x, y):
        return self.sum(jnp.where(self.is_at(x, y), x, jnp.zeros_like(x)))

    def depth_off_label(self, x, off):
        # In the one reading's sum a class that dominates is exactly 1.
        return Normalizer(off.m, off.z - 1).depth_and_dominant(x, off.m, self)[0]


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sums_here(x, way):
    """Of this device's classes.

    Of two sets of classes the one with the lower maximum is scaled to the other's, and its own maximal class joins the
    others: all terms are positive.
    """

    def merged(a, b):
        a_is_first = a[0] >= b[0]
        m, (s, t) = jnp.maximum(a[0], b[0]), (jnp.where(a_is_first, *pair) for pair in zip(a[1:], b[1:], strict=True))
        m_b, s_b, t_b = (jnp.where(a_is_first, *pair) for pair in zip(b, a, strict=True))
        depth = jnp.where(m_b == -jnp.inf, FAR, jnp.minimum(m - m_b, FAR))
        e, z_b = exp(-depth), 1 + s_b
        return m, s + e * z_b, t + e * (t_b + depth * z_b)

    first = tuple(jnp.asarray(number, x.dtype) for number in (-jnp.inf, 0, 0))
    sums = lax.reduce((x, jnp.zeros_like(x), jnp.zeros_like(x)), first, merged, (x.ndim + way.axis,))
    # Where XLA sees that one isn't asked for, it leaves it out, and then computes the others anew for who asks for all.
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
