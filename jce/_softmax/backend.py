"""The interface through which formulas sum over classes: a `Backend`. Each kind of platform has its own subclass.

With m = max x and eᵢ = exp(xᵢ - m), Z = Σ eᵢ = 1 + s (`softmax.py`). This file has the methods that several platforms
share. If platforms differ, the method here is for those on which a select inside a sum costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import jax.numpy as jnp
from jax import Array, lax

from jce._jax.classes import Classes
from jce._numerics.calculus import custom_jvp, ratio
from jce._numerics.elementary import exp, two_sum
from jce._numerics.mul0 import mul0, multiply
from jce._softmax.sums import Compared, Deviation, Exponentials, Normalizer, OffLabel, Sums


@dataclasses.dataclass(frozen=True)
class Backend(Classes, ABC):
    """Classes, with methods to sum over them on the platform for which a program is lowered.

    x stands for logits of these classes, already folded (`classes.py`).
    """

    masks = True  # whether a select inside a sum costs nothing

    @classmethod
    def of(cls, classes: Classes, x: Array) -> Self:
        """This backend for the classes of arrays like x."""
        return cls(classes.axis, classes.mesh_axis, classes.blocks, classes.any_shift)

    def reduce(self, reduction: Callable, x):
        return self.of_blocks(reduction, x)

    def results(self, function: Callable, arrays, ndim: int):
        """function(*arrays), where the largest arrays have `ndim` axes."""
        return function(*arrays)

    # Sums over classes

    def for_log_sum(self, x: Array) -> Backend:
        """The backend for a formula such as m + log Z, which uses m itself, not only x - m."""
        return self

    @abstractmethod
    def maximum(self, x: Array) -> Array:
        """m = max x. If it is +∞, x - m must be NaN at some class."""

    @abstractmethod
    def sums(self, x: Array) -> Sums: ...

    @abstractmethod
    def off_label(self, labels: Array, x: Array) -> OffLabel:
        """The sums with m = max x."""

    def off_label_of_any_shift(self, labels: Array, x: Array) -> OffLabel:
        """The sums with any m that keeps s and exp(x_y - m) in range, for the label y. Formulas may assume nothing else
        about m."""
        return self.off_label(labels, x)

    def exponentials_off_label(self, labels: Array, x: Array) -> tuple[OffLabel, Array]:
        """The results of `off_label_of_any_shift`, and exp(xᵢ - m), which is arbitrary at the label. For a kernel whose
        result is an array computed from these exponentials."""
        off = self.off_label_of_any_shift(labels, x)
        return off, exp(self.depth_off_label(x, off))

    def normalizer(self, x: Array) -> Normalizer:
        return Normalizer(*self.sums(x)[:2])

    def exponentials(self, x: Array) -> Exponentials:
        n = self.normalizer(x)
        return Exponentials(exp(x - self.column(n.m)), n.z, n)

    def max_and_sum(self, x: Array) -> tuple[Array, Array]:
        """m and Z. Z is 0 if all logits are -∞."""
        n = self.normalizer(x)
        return n.m, jnp.where(n.m == -jnp.inf, jnp.zeros_like(n.z), n.z)

    def sum_with_differences(self, terms: Array, p: Array, q: Array) -> Array:
        """Σ terms + Σ (p - q). The second sum is accurate to an ulp, even if Σ p and Σ q cancel up to rounding: each
        p - q is an exact pair of floats, high + low, and the terms are added to low."""
        high, low = two_sum(p, -q)
        return self.sum_of_two_floats(high, low + terms)

    def sum_of_two_floats(self, high: Array, low: Array) -> Array:
        zero = jnp.zeros((), high.dtype)
        high, low = self.reduce(lambda x, axis: lax.reduce(x, (zero, zero), _add, (x[0].ndim + axis,)), (high, low))
        return high + low

    # Elementwise functions that take sums

    def comparison(self, x: Array, stored: bool) -> tuple[Normalizer, Callable[[Array], Compared]]:
        """The normalizer of a row, and a function that returns the row's `Compared`. Each pass over both rows calls the
        function with s ≥ 0, a result of the previous pass (see `unshared`).

        With `stored`, qᵢ is kept in memory, for a kernel that reads it several times.
        """
        n = self.normalizer(x)

        def compared(s):
            m = self.unshared(n.m, s)
            depth, dominant = n.depth_and_dominant(x, m, self)
            return Compared(m, exp(depth) / self.column(n.z), dominant)

        return n, compared

    def unshared(self, m: Array, s: Array) -> Array:
        """m for the next pass, in a form that XLA doesn't recognize as m. Otherwise XLA would share exp(x - m) between
        the passes, and store N × n numbers. s ≥ 0 is a result of the previous pass, so max(m, m - s) is m."""
        return jnp.maximum(m, m - s)

    def exponential_of_pass(self, x: Array, number: int) -> Array:
        """eᵢ for pass `number` of a kernel. A platform may compute it separately in each pass, or store it once."""
        return exp(x - self.column(self.maximum(x)))

    def stored(self, e: Array) -> Array:
        """e, stored on platforms where reading it in several passes is faster than recomputing it in each."""
        return e

    def depth(self, x: Array, n: Normalizer) -> Array:
        """xᵢ - m ≤ 0, and exactly 0 at a class that dominates."""
        # The result is min(max(2d + lift, d), 0). If one class dominates (`softmax.py`), lift = 0.6: then 2d + 0.6 > 0
        # at this class, whose d > -0.3, so the result is 0. At all others d < -0.6, so 2d + 0.6 < d, and the result is
        # d. If no class dominates, lift < -9e29, so 2d + lift < d at all classes. The barrier makes XLA compute these
        # numbers, and the constant 0, once per row and for this pass only: XLA would store an array for a constant that
        # two passes share (`passes.py`).
        m, lift, zero = map(self.column, lax.optimization_barrier((n.m, 0.6 - 1e30 * n.undominated, 0 * n.s)))
        d = x - m
        depth = jnp.minimum(jnp.maximum(d + (d + lift), d), zero)
        return depth if self.mesh_axis is None else with_derivative_of(depth, jnp.maximum(d, jnp.finfo(d.dtype).min))

    def depth_off_label(self, x: Array, off: OffLabel) -> Array:
        """xᵢ - m, for all classes except the label."""
        return x - self.column(off.m)

    def put(self, x: Array, y: Array, r: Array) -> Array:
        """x (not folded), with r, a number per row, in the place of the local label y."""
        return jnp.where(self.is_at(x, y), self.column(r), x)

    def scattered(self, x: Array, y: Array, r: Array) -> Array:
        """The result of `put`, computed by a scatter. If no other operation reads x, XLA scatters in place, which
        touches no other entries."""
        y = jnp.where(self.has(x, y), y, jnp.full_like(y, x.shape[-1]))  # a negative index would count from the end
        return x.at[jnp.arange(y.size), y].set(r, mode="drop")

    # Derivatives along t

    def deviation(self, t: Array, x: Array) -> Deviation:
        """How t deviates from its mean under q.

        If a class dominates, its own t is first subtracted from all t. Then the deviation at that class is minus the
        sum over the others, in which nothing cancels.
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
        deviations = jnp.where(dominant, -column, (t - self.column(center)) - column)
        return Deviation(e, z, deviations, center + from_center, lambda a: sum_of_others(multiply(others, a)))


def _add(a, b):
    high, low = two_sum(a[0], b[0])
    return high, low + (a[1] + b[1])


@functools.partial(custom_jvp, nondiff_argnums=(1, 2))
def exponential(x: Array, number: int, backend: Backend) -> Array:
    """eᵢ = exp(xᵢ - m) for a constant m, as computed by pass `number` over x."""
    return backend.exponential_of_pass(x, number)


# deᵢ = eᵢtᵢ
@exponential.defjvp
def _exponential_rule(number, backend, primals, tangents):
    e = exponential(*primals, number, backend)
    return e, mul0(e, tangents[0])


def off_maximum(z: Array) -> Array:
    """Z - 1 for Z ≥ 4.6/3 = 1.53. For a smaller Z it is 4Z - 5.6, which is less than Z - 1, and ≤ 0 for Z ≤ 1.4.

    A masked sum leaves out every class with e above a threshold ≥ 0.6. If that is more than one class, Z > 1.6, and
    max(s, off_maximum(Z)) is Z - 1 instead of the sum s. If it is one class, max(s, off_maximum(Z)) is s up to
    rounding, and exactly s for Z ≤ 1.4, where Z - 1 would lose digits of s. The function is continuous, so passes that
    round Z differently get nearly the same s.
    """
    return jnp.minimum(z - 1, 4 * z - 5.6)


def with_derivative_of(a: Array, b: Array) -> Array:
    """a, with the derivative of b. If classes are split over devices, derivatives treat m as a constant. So the
    derivative of a sum without the maximal class lacks the term of that class, and b must provide the derivative."""
    # Until JAX 0.12: JAX loses the kernels' rules in the head's loop. With these rules, this would be unnecessary.
    return lax.stop_gradient(a) + (b - lax.stop_gradient(b))


def unless_no_class(number: Array, labels: Array, x: Array, classes: Classes) -> Array:
    """The number of each row, or NaN if the label of the row is out of range."""
    is_class = (labels >= 0) & (labels < classes.count(x))
    return jnp.where(is_class, number, jnp.full_like(number, jnp.nan))
