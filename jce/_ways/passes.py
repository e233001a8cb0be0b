"""A CPU's way: each sum is a pass over the row, and selects nothing.

XLA gives a reduction to a library with a fixed set of operations: a compare, a select or an iota inside one, or in what
is made of one for the next, is first written to memory, N × n numbers of it, and so is a constant that two passes
share. So masks are said in arithmetic here: min(eᵢ, 2⁹⁶|i - y|) leaves out class y, and eᵢ ⌊7/4 - eᵢ⌋ those
of eᵢ > 3/4. Where rows are short, the library is slow at two more things: an argument that meets a result, and a
constant that doesn't meet an argument. At a long formula the library is slow too: that had better end in a select, so
that one loop stores it for the sum.

A label's row needs no maximum (`known_label.py`): one pass sums it, or, where an array is made of eᵢ, stores them.

What two passes share, N × n numbers, XLA stores unless it fuses both. Where the result is a number a row, that would be
memory for nothing: so m is said again for each pass as max(m, m - s), which XLA can't see through, and the pass
computes its own eᵢ; of logits made in the same program it may see another rounding. Where the result is an array, eᵢ
are stored once, behind a barrier, and it is written over them: that takes 0.5 to 0.9 of the time.

Long rows are folded (`_classes.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._calculus import ratio
from jce._classes import Classes
from jce._elementary import exp, reused, two_sum
from jce._layout import may_be_split
from jce._mul0 import multiply
from jce._row_sum import row_sum
from jce._ways.known_label import at_maximum, off_known_label
from jce._ways.way import (
    Compared,
    Deviation,
    Exponentials,
    Normalizer,
    OffLabel,
    Sums,
    Way,
    exponential,
    off_maximum,
    unless_no_class,
    with_derivative_of,
)

FINE = 2.0**12  # how finely a weight is rounded that only centers a tangent


@dataclasses.dataclass(frozen=True)
class Passes(Way):
    masks = False

    @classmethod
    def of(cls, classes: Classes, x: Array) -> Self:
        return super().of(classes.folding(x), x)

    def maximum(self, x):
        m = self.max(x)
        return jnp.where(m == jnp.inf, m - m, m)

    def stored(self, e):
        return lax.optimization_barrier(e)

    def exponential_of_pass(self, x, k):
        m = self.maximum(x)
        if self.blocks == 1:
            return self.stored(exp(x - self.column(m)))
        # The result can't be written over what is stored of folded rows: there each pass computes its own.
        return exp(x - self.column(self.again(m, k * self.sum(exp(x - self.column(m)))) if k else m))

    def normalizer(self, x):
        m = self.maximum(x)
        z = self.sum(exp(x - self.column(m)))
        return self._normalizer(m, exp(x - self.column(m if self.are_few(x) else self.again(m, z))), z)

    def _normalizer(self, m, e, z):
        most = jnp.maximum(1.75, -z)  # 7/4: a number a row, since a constant would be shared with another array's sum
        s = self.sum(e * jnp.floor(self.column(most) - e))
        s = jnp.maximum(s, off_maximum(z))
        return Normalizer(m, s if self.mesh_axis is None else with_derivative_of(s, z))

    def sums(self, x):
        n = self.normalizer(x)
        if self.mesh_axis is None:
            d = x - self.column(self.again(n.m, n.log_z))
            e = exp(d)
            # eᵢ, and 0 for a class that dominates, where xᵢ - m is 0
            weight = jnp.minimum(jnp.floor(self.column(self.again(1.75 + n.shared, n.log_z)) - e), e)
        else:
            d = self.depth(x, n)
            weight = exp(d)
        # The lowest number for -∞, where eᵢ = 0 multiplies it.
        return Sums(*n, -self.sum(weight * jnp.maximum(d, jnp.finfo(x.dtype).min)))

    def exponentials(self, x):
        m, z = self.maximum(x), self.sum(exponential(x, 0, self))
        return Exponentials(exponential(x, 4, self), z, self._normalizer(m, exponential(x, 1, self), z))

    def comparison(self, x, stored):
        if not stored:
            return super().comparison(x, stored)
        e, _, n = self.exponentials(x)
        dominant = e > self.column(0.6 + n.shared)
        # Not fused with a difference: q - p is p - q but for its sign.
        q = reused(jnp.where(dominant, jnp.ones_like(e), e) / self.column(n.z))
        return n, lambda s: Compared(self.again(n.m, s), q, dominant)

    def max_and_sum(self, x):
        m = self.maximum(x)
        return m, self.sum(exp(x - self.column(jnp.maximum(m, jnp.finfo(m.dtype).min))))

    def sum_with_differences(self, terms, p, q):
        """In float64 where numbers are float32, which is fast for many classes."""
        total = self.sum(terms)
        if p.dtype != jnp.float32 or self.are_few(p):
            return total + self.sum_of_two_floats(*two_sum(p, -q))
        with jax.enable_x64(True):
            difference = p.astype(jnp.float64) - q.astype(jnp.float64)
            here = self
            if self.blocks == 1:  # as float32 they may have been short enough
                here = Passes.of(self, difference)
                difference = here.fold(difference)
            return total + here.reduce(row_sum, difference).astype(p.dtype)

    def off_label(self, labels, x):
        m = self.maximum(x)
        return self._off_label(labels, x, m, self._sum_off_label(labels, x)(m), self._at(labels, x))

    def off_label_of_any_shift(self, labels, x):
        if self._asks_for_maximum(x):
            return self.off_label(labels, x)
        at, sum_off_label = self._at(labels, x), self._sum_off_label(labels, x)
        m, s = self._off_known_label(at, lambda m: [sum_off_label(m)], x)
        return self._off_label(labels, x, m, s, at)

    def exponentials_off_label(self, labels, x):
        # The result can't be written over what is stored of folded rows (`exponential_of_pass`).
        if self._asks_for_maximum(x) or self.blocks > 1:
            return super().exponentials_off_label(labels, x)

        def others(m):
            # The mask is made here: one that the two readings share would be stored.
            is_label, e = self.is_at(x, self.local(labels, x)), exp(x - self.column(m))
            e = self.stored(jnp.where(is_label, jnp.zeros_like(e), e))
            return [self.sum(e), e]

        at = self._at(labels, x)
        m, s, e = self._off_known_label(at, others, x)
        return self._off_label(labels, x, m, s, at), e

    def _asks_for_maximum(self, x):
        return not self.any_shift or self.mesh_axis is not None or may_be_split(x)

    def _off_known_label(self, at, others, x):
        most = 64.0 + 8 * self.count(x)
        return off_known_label(at, others, at_maximum(others, lambda: self.maximum(x)), most)

    def _at(self, labels, x):
        return self.at(x, self.local(labels, x))

    def _off_label(self, labels, x, m, s, at):
        return OffLabel(m, s, unless_no_class(m - at, labels, x, self))

    def _sum_off_label(self, labels, x):
        """s of an m, in which min(eᵢ, far |i - y|) leaves out the label."""
        far = 2.0**800 if x.dtype == jnp.float64 else 2.0**96  # a power of 2: far y is exact where an FMA takes it too
        exact = self.count(x) <= 2 ** jnp.finfo(x.dtype).nmant
        dtype, scale = (x.dtype, far) if exact else (labels.dtype, 1)
        # Behind the barrier the class index is an array in memory; without, an iota in the sum.
        index = lax.optimization_barrier(scale * jnp.arange(self.count_here(x), dtype=dtype))
        y = scale * self.local(labels, x).astype(dtype)

        def total(m):
            i = self.fold(jnp.expand_dims(index, range(1, -self.axis)))
            distance = jnp.abs(jnp.expand_dims(i, range(x.ndim - i.ndim)) - self.column(y))
            distance = distance if exact else far * distance.astype(x.dtype)
            return self.sum(jnp.minimum(exp(x - self.column(m)), distance))

        return total

    def depth_off_label(self, x, off):
        # What is made of it is written over eᵢ, but where rows are folded: there each pass computes its own.
        return x - self.column(off.m if self.blocks == 1 else self.again(off.m, off.s))

    def put(self, x, y, r):
        return self.scattered(x, y, r)

    def deviation(self, t, x):
        z = self.sum(exponential(x, 0, self))
        shared = jnp.minimum(jnp.floor(z - 0.5), 1)

        # A factor a row is cheap where it meets an argument, if classes are few, and otherwise their sum.
        few = self.are_few(x)

        def early(r, a):
            return multiply(jnp.broadcast_to(self.column(r), a.shape), a) if few else a

        def late(r, total):
            return total if few else multiply(r, total)

        # t is taken from a number a row, any: the dominating class's, or a mean with weights of 12 bits.
        weight = jnp.floor(self.column(1.25 + FINE * shared) * exponential(x, 2, self))
        scale = 1 / jnp.maximum(1, FINE * shared * lax.stop_gradient(z))
        center = late(scale, self.sum(multiply(weight, early(scale, t))))

        # 0 at a class that dominates, with eᵢ = 1 or qᵢ > 2/3, and eᵢ or qᵢ at any other
        over_z = ratio(jnp.ones_like(z), z)
        e = early(over_z, exponential(x, 3, self))
        others = jnp.minimum(jnp.floor(self.column(1.6 + 2 * shared) - e), e)

        def sum_of_others(a):
            return late(over_z, self.sum(multiply(a, t - self.column(center))))

        mean_from_center = sum_of_others(others)
        # Behind the barrier it is the last pass's own; elementwise, that pass may select.
        from_center = t - self.column(lax.optimization_barrier(center))
        mean = self.column(mean_from_center)
        e = exponential(x, 4, self)
        dominant = lax.stop_gradient(e) > self.column(0.6 + shared)
        each = jnp.where(dominant, -mean, from_center - mean)
        return Deviation(e, z, each, center + mean_from_center, lambda a: sum_of_others(multiply(others, a)))
