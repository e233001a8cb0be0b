"""The backend for accelerators: one reduction with several results is one pass over the row, and may use selects.

These passes are memory-bound: their time depends only on the bytes that they read and write. m, s and the entropy's
sum come from one pass. So all three are computed from the same rounding of x, and nothing cancels between them. To look
up a label's logit, a GPU gathers, which reads very little. A TPU uses a mask, in a pass that computes another sum too.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from jce._numerics.calculus import custom_jvp
from jce._numerics.elementary import exp
from jce._numerics.mul0 import mul0
from jce._softmax.backend import Backend, off_maximum, unless_no_class
from jce._softmax.sums import Normalizer, OffLabel, Sums

FAR = 1e4  # this far below the maximum, exp is 0, also in float64 (where it is 0 from 745 on)


class Reduction(Backend):
    def maximum(self, x):
        return self.sums(x).m

    def sums(self, x):
        """m, s and t. s is NaN in rows where m is ±∞ or NaN."""
        m, s, t = _sums_here(x, self)
        if self.mesh_axis is not None:
            here, m = m, lax.pmax(lax.stop_gradient(m), self.mesh_axis)
            # Each device whose own maximum is less than 0.5 below m leaves one maximal class out of s. If several
            # devices do so, `off_maximum` corrects s, since each of these classes has e > e^-0.5 = .61 > .6.
            depth = jnp.minimum(jnp.maximum(m, jnp.finfo(m.dtype).min) - lax.stop_gradient(here), FAR)
            e, z = exp(-depth), 1 + s
            t, s, z = map(self.over_devices, (e * (t + depth * z), e * jnp.where(depth < 0.5, s, z), e * z))
            s = jnp.maximum(s, off_maximum(z))
        return Sums(m, s + (m - m), t)

    def off_label(self, labels, x):
        m, s, _ = self.sums(x)
        m = unless_no_class(m, labels, x, self)
        d = m - self.at_label(x, labels)
        # If s < 1/2, one class dominates (`softmax.py`). If then d < 1/2, this class is the label, and d is set to 0.
        d = jnp.where(jnp.maximum(s, d) < 0.5, d - lax.stop_gradient(d), d)
        return OffLabel(m, s + (1 - exp(-d)), d)

    def at_label(self, x, labels):
        return self.at(x, self.local(labels, x))

    def depth_off_label(self, x, off):
        # In the reduction's sum, a class that dominates counts as exactly 1, so its depth must be 0 here too.
        return Normalizer(off.m, off.z - 1).depth_and_dominant(x, off.m, self)[0]


class MaskedReduction(Reduction):
    """The backend for TPUs. Gathers are slow there, so a mask looks up labels. XLA for TPUs fuses two sums into one
    pass if they share m, so `unshared` returns m itself."""

    def unshared(self, m, s):
        return m

    def at_label(self, x, labels):
        return self.sum(jnp.where(self.is_at(x, self.local(labels, x)), x, jnp.zeros_like(x)))


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sums_here(x, backend):
    """m, s and t of this device's classes.

    To merge two sets of classes, the sums of the set with the lower maximum are rescaled to the other's maximum. The
    maximal class of that set, left out before, is added to s and t. All terms are positive, so nothing cancels.

    `merged` must not call jitted functions such as `jnp.where`: XLA crashes at such a call if no result of the
    reduction is used (jaxlib 0.10 to 0.12).
    """

    def merged(a, b):
        a_is_first = a[0] >= b[0]
        m, (s, t) = jnp.maximum(a[0], b[0]), (lax.select(a_is_first, *pair) for pair in zip(a[1:], b[1:], strict=True))
        m_b, s_b, t_b = (lax.select(a_is_first, *pair) for pair in zip(b, a, strict=True))
        depth = lax.select(m_b == -jnp.inf, jnp.full_like(m, FAR), jnp.minimum(m - m_b, FAR))
        e, z_b = exp(-depth), 1 + s_b
        return m, s + e * z_b, t + e * (t_b + depth * z_b)

    first = tuple(jnp.asarray(number, x.dtype) for number in (-jnp.inf, 0, 0))
    sums = lax.reduce((x, jnp.zeros_like(x), jnp.zeros_like(x)), first, merged, (x.ndim + backend.axis,))
    # Without the barrier, XLA drops the results that a caller doesn't use. If another caller uses all results, XLA then
    # computes the others twice.
    return tuple(lax.optimization_barrier(tuple(sums)))


# For a constant m, ds = Σ eᵢdxᵢ and dt = Σ eᵢ (m - xᵢ - 1) dxᵢ, over all classes.
@_sums_here.defjvp
def _sums_here_rule(backend, primals, tangents):
    (x,), (dx,) = primals, tangents
    m, s, t = _sums_here(x, backend)
    finite = lax.stop_gradient(jnp.maximum(m, jnp.finfo(m.dtype).min))
    depth = jnp.minimum(backend.column(finite) - x, FAR)
    slopes = exp(-depth), exp(-depth) * (depth - 1)
    return (m, s, t), (jnp.zeros_like(m), *(backend.reduce(jnp.sum, mul0(slope, dx)) for slope in slopes))
