"""The backend for CPUs (`__init__.py` defines the terms): each sum is a pass over the row. Sums contain no selects.

XLA computes sums with a library that has a fixed set of operations. If the terms of a sum are computed by a compare, a
select or an iota, or if one of these stands between two sums, XLA stores the terms first (N × n numbers). It also does
this if two passes share a constant. So masks are arithmetic here: eᵢ min(|i - y|, 1) leaves out class y, and
eᵢ ⌊7/4 - eᵢ⌋ leaves out classes with eᵢ > 3/4.

The library is slow at long formulas. So a long formula ends in a select on purpose: XLA then computes the terms in a
loop of its own, and the library only adds them. For short rows, the library is slow at two more things: combining an
input with a number per row, and constants that aren't combined with any input.

The loss of a label needs no maximum (`known_label.py`). One pass sums the eᵢ, and stores them if the result is an
array.

If two passes read the same eᵢ, XLA stores these N × n numbers, unless it fuses the passes. If the result is a number
per row, this would waste memory. So each pass gets m in a form that XLA doesn't recognize as m (`Backend.unshared`),
and recomputes eᵢ, perhaps from logits that are rounded differently. If the result is an array, the eᵢ are stored once,
behind a barrier, and the result is written over them. That takes 0.5 to 0.9 times as long as recomputing eᵢ.

Long rows are folded (`classes.py`).
"""

from __future__ import annotations

import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._jax.classes import Classes
from jce._jax.layout import may_be_split
from jce._jax.row_sum import row_sum
from jce._numerics.calculus import ratio
from jce._numerics.elementary import exp, reused, two_sum
from jce._numerics.mul0 import multiply
from jce._softmax.backend import Backend, exponential, off_maximum, unless_no_class, with_derivative_of
from jce._softmax.known_label import at_maximum, off_known_label
from jce._softmax.sums import Compared, Deviation, Exponentials, Normalizer, OffLabel, Sums

FINE = 2.0**12  # a weight that only centers a tangent (`deviation`) needs no more than 12 bits of eᵢ


class Passes(Backend):
    masks = False

    @classmethod
    def of(cls, classes: Classes, x: Array) -> Self:
        return super().of(classes.folding(x), x)

    def maximum(self, x):
        return self.max(x)  # +∞ needs no special case: x - m is NaN there, and so is each sum of exponentials

    def stored(self, e):
        return lax.optimization_barrier(e)

    def exponential_of_pass(self, x, number):
        m = self.maximum(x)
        if self.blocks == 1:
            return self.stored(exp(x - self.column(m)))
        # For folded rows, the result can't be written over stored eᵢ. So each pass recomputes eᵢ.
        return exp(x - self.column(self.unshared(m, number * self.sum(exp(x - self.column(m)))) if number else m))

    def normalizer(self, x):
        m = self.maximum(x)
        z = self.sum(exp(x - self.column(m)))
        return self._normalizer(m, exp(x - self.column(m if self.are_few(x) else self.unshared(m, z))), z)

    def _normalizer(self, m, e, z):
        most = jnp.maximum(1.75, -z)  # 7/4 as a number per row: XLA would store a constant shared with another sum
        s = self.sum(e * jnp.floor(self.column(most) - e))
        s = jnp.maximum(s, off_maximum(z))
        return Normalizer(m, s if self.mesh_axis is None else with_derivative_of(s, z))

    def sums(self, x):
        n = self.normalizer(x)
        if self.mesh_axis is None:
            d = x - self.column(self.unshared(n.m, n.log_z))
            e = exp(d)
            # For a class that dominates, the weight is ⌊7/4 - 1⌋ = 0. For all others the floor is ≥ 1, so the weight is
            # eᵢ.
            weight = jnp.minimum(jnp.floor(self.column(self.unshared(1.75 + n.undominated, n.log_z)) - e), e)
        else:
            d = self.depth(x, n)
            weight = exp(d)
        # A -∞ is raised to the lowest finite number: eᵢ = 0 there, and 0 · ∞ would be NaN.
        return Sums(*n, -self.sum(weight * jnp.maximum(d, jnp.finfo(x.dtype).min)))

    def exponentials(self, x):
        m, z = self.maximum(x), self.sum(exponential(x, 0, self))
        return Exponentials(exponential(x, 4, self), z, self._normalizer(m, exponential(x, 1, self), z))

    def comparison(self, x, stored):
        if not stored:
            return super().comparison(x, stored)
        e, _, n = self.exponentials(x)
        dominant = e > self.column(0.6 + n.undominated)
        # Without `reused`, XLA might contract the quotient with a difference: q - p must be exactly -(p - q).
        q = reused(jnp.where(dominant, jnp.ones_like(e), e) / self.column(n.z))
        return n, lambda s: Compared(self.unshared(n.m, s), q, dominant)

    def max_and_sum(self, x):
        m = self.maximum(x)
        return m, self.sum(exp(x - self.column(jnp.maximum(m, jnp.finfo(m.dtype).min))))

    def sum_with_differences(self, terms, p, q):
        """Sums float32 numbers in float64, which is fast if there are many classes."""
        total = self.sum(terms)
        if p.dtype != jnp.float32 or self.are_few(p):
            return total + self.sum_of_two_floats(*two_sum(p, -q))
        with jax.enable_x64(True):
            difference = p.astype(jnp.float64) - q.astype(jnp.float64)
            here = self
            if self.blocks == 1:  # rows that are short enough in float32 may have to be folded in float64
                here = Passes.of(self, difference)
                difference = here.fold(difference)
            return total + here.reduce(row_sum, difference).astype(p.dtype)

    def off_label(self, labels, x):
        m = self.maximum(x)
        return self._off_label(labels, x, m, self._sum_off_label(labels, x)(m), self._at(labels, x))

    def off_label_of_any_shift(self, labels, x):
        if self._needs_maximum(x):
            return self.off_label(labels, x)
        at, sum_off_label = self._at(labels, x), self._sum_off_label(labels, x)
        m, s = self._off_known_label(at, lambda m, second: [sum_off_label(m, keeps_nan=second)], x)
        return self._off_label(labels, x, m, s, at)

    def exponentials_off_label(self, labels, x):
        # For folded rows, the result can't be written over stored eᵢ (`exponential_of_pass`).
        if self._needs_maximum(x) or self.blocks > 1:
            return super().exponentials_off_label(labels, x)

        def others(m, second):
            # The mask is computed in each of the two passes: XLA would store a mask that both share.
            is_label, e = self.is_at(x, self.local(labels, x)), exp(x - self.column(m))
            e = self.stored(jnp.where(is_label, jnp.zeros_like(e), e))
            return [self.sum(e), e]

        at = self._at(labels, x)
        m, s, e = self._off_known_label(at, others, x)
        return self._off_label(labels, x, m, s, at), e

    def _needs_maximum(self, x):
        return not self.any_shift or self.mesh_axis is not None or may_be_split(x)

    def _off_known_label(self, at, others, x):
        # If s < most, then xᵢ - x_y < log(64 + 8n), which is 9 for n = 1000. Rounding xᵢ - x_y then changes eᵢ by
        # at most half of this bound, in ulps.
        most = 64.0 + 8 * self.count(x)
        first, second = (functools.partial(others, second=second) for second in (False, True))
        return off_known_label(at, first, at_maximum(second, lambda: self.maximum(x)), most)

    def _at(self, labels, x):
        return self.at(x, self.local(labels, x))

    def _off_label(self, labels, x, m, s, at):
        return OffLabel(m, s, unless_no_class(m - at, labels, x, self))

    def _sum_off_label(self, labels, x):
        """s as a function of m: the sum of eᵢ min(far |i - y|, 1), which is 0 at the label y, and eᵢ elsewhere.

        Without `keeps_nan` the terms are min(eᵢ, far |i - y|). They take less time, but XLA may turn a NaN into `far`
        or more (`Classes.above_0`). Both forms are equal if all eᵢ < far. Otherwise s ≥ 2⁶⁴ (2⁶⁰⁰ in float64), and the
        row gets a second pass (`known_label.py`), with `keeps_nan`.
        """
        # `far` is a power of 2, so that far · y is exact, whether XLA fuses it or not.
        far = 2.0**800 if x.dtype == jnp.float64 else 2.0**96
        exact = self.count(x) <= 2 ** jnp.finfo(x.dtype).nmant
        dtype, scale = (x.dtype, far) if exact else (labels.dtype, 1)
        # The barrier makes the class indices an array [n] in memory. Without it they would be an iota inside the sum,
        # and XLA would write the sum's operand to memory.
        index = lax.optimization_barrier(scale * jnp.arange(self.count_here(x), dtype=dtype))
        y = scale * self.local(labels, x).astype(dtype)

        def total(m, keeps_nan=True):
            i = self.fold(jnp.expand_dims(index, range(1, -self.axis)))
            distance = jnp.abs(jnp.expand_dims(i, range(x.ndim - i.ndim)) - self.column(y))
            distance = distance if exact else far * distance.astype(x.dtype)
            e = exp(x - self.column(m))
            return self.sum(e * jnp.minimum(distance, 1) if keeps_nan else jnp.minimum(e, distance))

        return total

    def depth_off_label(self, x, off):
        # The result is written over stored eᵢ, except for folded rows, where each pass recomputes eᵢ.
        return x - self.column(off.m if self.blocks == 1 else self.unshared(off.m, off.s))

    def put(self, x, y, r):
        return self.scattered(x, y, r)

    def deviation(self, t, x):
        z = self.sum(exponential(x, 0, self))
        undominated = jnp.minimum(jnp.floor(z - 0.5), 1)

        # If there are few classes, it is cheaper to multiply an input of a sum by a factor per row (`early`). Otherwise
        # it is cheaper to multiply the sum (`late`).
        few = self.are_few(x)

        def early(r, a):
            return multiply(jnp.broadcast_to(self.column(r), a.shape), a) if few else a

        def late(r, total):
            return total if few else multiply(r, total)

        # Any number per row may be subtracted from t as its center. If a class dominates (`softmax.py`), the center is
        # the t of that class: its weight is ⌊1.25⌋ = 1, and the other classes' weight is ⌊1.25 eᵢ⌋ = 0. If no class
        # dominates, the center is a mean with weights ⌊4097.25 eᵢ⌋.
        weight = jnp.floor(self.column(1.25 + FINE * undominated) * exponential(x, 2, self))
        scale = 1 / jnp.maximum(1, FINE * undominated * lax.stop_gradient(z))
        center = late(scale, self.sum(multiply(weight, early(scale, t))))

        # `others` is computed from a = eᵢ or, if there are few classes, a = qᵢ. At a class that dominates, a > 2/3, so
        # `others` is ⌊1.6 - a⌋ = 0. At all others a < 1/2, so ⌊1.6 - a⌋ = 1, and `others` is a. If no class dominates,
        # `others` is a at all classes, since ⌊3.6 - a⌋ ≥ 2 > a.
        over_z = ratio(jnp.ones_like(z), z)
        e = early(over_z, exponential(x, 3, self))
        others = jnp.minimum(jnp.floor(self.column(1.6 + 2 * undominated) - e), e)

        def sum_of_others(a):
            return late(over_z, self.sum(multiply(a, t - self.column(center))))

        mean_from_center = sum_of_others(others)
        # Because of the barrier, the last pass shares no array with the sums: XLA would store such an array. The last
        # pass is elementwise, so it may use selects.
        from_center = t - self.column(lax.optimization_barrier(center))
        mean = self.column(mean_from_center)
        e = exponential(x, 4, self)
        dominant = lax.stop_gradient(e) > self.column(0.6 + undominated)
        deviations = jnp.where(dominant, -mean, from_center - mean)
        return Deviation(e, z, deviations, center + mean_from_center, lambda a: sum_of_others(multiply(others, a)))
