"""What each way of summing rows offers to formulas: classes whose sums suit a machine.

With m = max x and eᵢ = exp(xᵢ - m), Z = Σ eᵢ = 1 + s; `_softmax.py` says what s is for. Here is what is the same on all
machines, and what one would write where a select in a sum costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import Array, lax

from jce._calculus import custom_jvp, ratio
from jce._classes import Classes
from jce._elementary import exp, log1p, two_sum
from jce._mul0 import mul0, multiply


class Sums(NamedTuple):
    """Of some classes m = max x and, over all but one that has it, s = Σ eᵢ and t = Σ eᵢ (m - xᵢ)."""

    m: Array
    s: Array
    t: Array


class OffLabel(NamedTuple):
    """Some m, s = Σ exp(xᵢ - m) over all classes but the label, and d = m - x at the label; NaN for no class."""

    m: Array
    s: Array
    d: Array

    @property
    def z(self) -> Array:
        return self.s + exp(-self.d)


class Normalizer(NamedTuple):
    """m = max x, and the off-maximum sum s, of each row: Σ exp(xᵢ - m) = 1 + s = Z."""

    m: Array
    s: Array

    @property
    def z(self) -> Array:
        return 1 + self.s

    @property
    def log_z(self) -> Array:
        return log1p(self.s)

    @property
    def shared(self) -> Array:
        """0 where one class dominates, with more than 2/3 of q, and 1 or more where none does."""
        return jnp.floor(self.s + 0.5)

    def surprisal(self, x: Array, way: Way) -> Array:
        """log 1/qᵢ = log Z - (xᵢ - m)"""
        return way.column(self.log_z) - way.depth(x, self)

    def depth_and_dominant(self, x: Array, m: Array, way: Way) -> tuple[Array, Array]:
        """`Way.depth` for an elementwise pass, which may select, and with its own m; and where the class dominates."""
        d = x - way.column(m)
        dominant = d > way.column(self.shared - 0.5)
        return jnp.where(dominant, jnp.zeros_like(d), d), dominant


class Exponentials(NamedTuple):
    """eᵢ and Z, for a kernel that makes an array of them; and the normalizer."""

    e: Array
    z: Array
    of_row: Normalizer


class Compared(NamedTuple):
    """Of a row that is compared with another, in a pass: m, qᵢ, and which class dominates."""

    m: Array
    q: Array
    dominant: Array


class Deviation(NamedTuple):
    """eᵢ, Z, tᵢ - Σⱼ qⱼtⱼ, Σⱼ qⱼtⱼ, and Σᵢ aᵢqᵢ (tᵢ - Σⱼ qⱼtⱼ) as a function of any a with Σᵢ aᵢqᵢ = 0."""

    e: Array
    z: Array
    each: Array
    mean: Array
    covariance: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Way(Classes, ABC):
    """Classes, and how they are summed where a program is lowered. x are logits of them, folded as they are."""

    masks = True  # whether a select in a sum costs nothing

    @classmethod
    def of(cls, classes: Classes, x: Array) -> Self:
        """The classes of arrays like x."""
        return cls(classes.axis, classes.mesh_axis, classes.blocks, classes.any_shift)

    def reduce(self, reduction: Callable, x):
        return self.of_blocks(reduction, x)

    def results(self, function: Callable, arrays, ndim: int, apart: bool):
        """The function's, of arrays of which the largest have so many axes; apart, it shares nothing with another."""
        return function(*arrays)

    # Sums over classes

    def for_log_sum(self, x: Array) -> Way:
        """The way of a formula that takes m itself, and not only in x - m."""
        return self

    @abstractmethod
    def maximum(self, x: Array) -> Array:
        """m = max x, and NaN where it is +∞."""

    @abstractmethod
    def sums(self, x: Array) -> Sums: ...

    @abstractmethod
    def off_label(self, labels: Array, x: Array) -> OffLabel:
        """With m = max x."""

    def off_label_of_any_shift(self, labels: Array, x: Array) -> OffLabel:
        """With any m, of which no formula may ask more than that s and e^-d are in range."""
        return self.off_label(labels, x)

    def exponentials_off_label(self, labels: Array, x: Array) -> tuple[OffLabel, Array]:
        """The same, and exp(xᵢ - m) of all classes but the label, whose is whatever: for a kernel that makes an array
        of them."""
        off = self.off_label_of_any_shift(labels, x)
        return off, exp(self.depth_off_label(x, off))

    def normalizer(self, x: Array) -> Normalizer:
        return Normalizer(*self.sums(x)[:2])

    def exponentials(self, x: Array) -> Exponentials:
        n = self.normalizer(x)
        return Exponentials(exp(x - self.column(n.m)), n.z, n)

    def max_and_sum(self, x: Array) -> tuple[Array, Array]:
        """m and Z, which is 0 where all classes are impossible."""
        n = self.normalizer(x)
        return n.m, jnp.where(n.m == -jnp.inf, jnp.zeros_like(n.z), n.z)

    def sum_with_differences(self, terms: Array, p: Array, q: Array) -> Array:
        """Σ terms + Σ (p - q), the latter to an ulp, even where it is the little that rounding left of 1 - 1: a sum of
        two-float numbers, whose lower parts the terms join."""
        high, low = two_sum(p, -q)
        return self.sum_of_two_floats(high, low + terms)

    def sum_of_two_floats(self, high: Array, low: Array) -> Array:
        zero = jnp.zeros((), high.dtype)
        high, low = self.reduce(lambda x, axis: lax.reduce(x, (zero, zero), _add, (x[0].ndim + axis,)), (high, low))
        return high + low

    # Elementwise, of sums

    def comparison(self, x: Array, stored: bool) -> tuple[Normalizer, Callable[[Array], Compared]]:
        """The normalizer, and what a pass over both rows reads of x, given s ≥ 0, a result of the pass before.

        Stored, for a kernel that reads it several times.
        """
        n = self.normalizer(x)

        def compared(s):
            m = self.again(n.m, s)
            depth, dominant = n.depth_and_dominant(x, m, self)
            return Compared(m, exp(depth) / self.column(n.z), dominant)

        return n, compared

    def again(self, m: Array, s: Array) -> Array:
        """m, as XLA can't see, for another pass over the logits; s ≥ 0 is a result of the pass before."""
        return jnp.maximum(m, m - s)

    def exponential_of_pass(self, x: Array, k: int) -> Array:
        return exp(x - self.column(self.maximum(x)))

    def stored(self, e: Array) -> Array:
        """An array that several passes read, where that is better than to compute it in each."""
        return e

    def depth(self, x: Array, n: Normalizer) -> Array:
        """xᵢ - m ≤ 0, and exactly 0 at a class that dominates."""
        # That class has d > -0.3, where 2d + 0.6 is above 0. All others have d < log 1/2, where it is below d. Behind
        # the barrier these numbers, also the constants, are computed once a row, and this pass's own.
        m, lift, zero = map(self.column, lax.optimization_barrier((n.m, 0.6 - 1e30 * n.shared, 0 * n.s)))
        d = x - m
        depth = jnp.minimum(jnp.maximum(d + (d + lift), d), zero)
        return depth if self.mesh_axis is None else with_derivative_of(depth, jnp.maximum(d, jnp.finfo(d.dtype).min))

    def depth_off_label(self, x: Array, off: OffLabel) -> Array:
        """xᵢ - m, for all classes but the label."""
        return x - self.column(off.m)

    def put(self, x: Array, y: Array, r: Array) -> Array:
        """x, not folded, with a number a row in the place of a local label's."""
        return jnp.where(self.is_at(x, y), self.column(r), x)

    def scattered(self, x: Array, y: Array, r: Array) -> Array:
        """The same where x isn't read for something else: the others' entries aren't either."""
        y = jnp.where(self.has(x, y), y, jnp.full_like(y, x.shape[-1]))  # a negative index would count
        return x.at[jnp.arange(y.size), y].set(r, mode="drop")

    # Derivatives along t

    def deviation(self, t: Array, x: Array) -> Deviation:
        """How t deviates from its mean under q.

        Where a class dominates, t counts from its own: the deviation there is minus the sum of the small rest, with all
        its digits.
        """
        still = lax.stop_gradient(x)
        n = self.normalizer(still)
        dominant = n.depth_and_dominant(still, n.m, self)[1]
        e, zero = exponential(x, 0, self), jnp.zeros_like(t)
        others, center = jnp.where(dominant, zero, e), self.sum(jnp.where(dominant, t, zero))
        z = self.sum(e)
        over_z = ratio(jnp.ones_like(z), z)

        def sum_of_others(weights):
            return multiply(over_z, self.sum(multiply(weights, t)) - multiply(self.sum(weights), center))

        from_center = sum_of_others(others)

        column = self.column(from_center)
        each = jnp.where(dominant, -column, (t - self.column(center)) - column)
        return Deviation(e, z, each, center + from_center, lambda a: sum_of_others(multiply(others, a)))


def _add(a, b):
    high, low = two_sum(a[0], b[0])
    return high, low + (a[1] + b[1])


@functools.partial(custom_jvp, nondiff_argnums=(1, 2))
def exponential(x: Array, k: int, way: Way) -> Array:
    """eᵢ = exp(xᵢ - m), for a constant m, in the pass number k over x."""
    return way.exponential_of_pass(x, k)


# deᵢ = eᵢtᵢ
@exponential.defjvp
def _exponential_rule(k, way, primals, tangents):
    e = exponential(*primals, k, way)
    return e, mul0(e, tangents[0])


def off_maximum(z: Array) -> Array:
    """Z - 1, which s is where Z ≥ 3/2, and less than s otherwise. Between 1.4 and 1.53 they are the same."""
    return jnp.minimum(z - 1, 4 * z - 5.6)


def with_derivative_of(a: Array, b: Array) -> Array:
    """a, with b's derivative: of where m is a constant, as it is over devices, a sum without the maximal class has not
    all of its own. Rules don't need it, but JAX before 0.12 forgets them in the head's loop."""
    return lax.stop_gradient(a) + (b - lax.stop_gradient(b))


def unless_no_class(number: Array, labels: Array, x: Array, classes: Classes) -> Array:
    """A number a row, and NaN for a label out of range."""
    is_class = (labels >= 0) & (labels < classes.count(x))
    return jnp.where(is_class, number, jnp.full_like(number, jnp.nan))
