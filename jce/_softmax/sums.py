"""The results of passes over a row: m = max x, and sums of eᵢ = exp(xᵢ - m). The normalizer is Z = Σ eᵢ = 1 + s.

`softmax.py` explains why s is computed, and not only Z."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from jce._numerics.elementary import exp, log1p

if TYPE_CHECKING:
    from jce._softmax.backend import Backend


class Sums(NamedTuple):
    """m = max x and, over all classes except one maximal class, s = Σ eᵢ and t = Σ eᵢ (m - xᵢ)."""

    m: Array
    s: Array
    t: Array


class OffLabel(NamedTuple):
    """m, s = Σ exp(xᵢ - m) over all classes except the label y, and d = m - x_y (NaN for a label out of range). m need
    not be the maximum."""

    m: Array
    s: Array
    d: Array

    @property
    def z(self) -> Array:
        return self.s + exp(-self.d)


class Normalizer(NamedTuple):
    """m = max x and the off-maximum sum s, per row: Σ exp(xᵢ - m) = 1 + s = Z."""

    m: Array
    s: Array

    @property
    def z(self) -> Array:
        return 1 + self.s

    @property
    def log_z(self) -> Array:
        return log1p(self.s)

    @property
    def undominated(self) -> Array:
        """0 if one class dominates (s < 1/2), and 1 or more if none does (`softmax.py`)."""
        return jnp.floor(self.s + 0.5)

    def surprisal(self, x: Array, backend: Backend) -> Array:
        """log 1/qᵢ = log Z - (xᵢ - m)"""
        return backend.column(self.log_z) - backend.depth(x, self)

    def depth_and_dominant(self, x: Array, m: Array, backend: Backend) -> tuple[Array, Array]:
        """`Backend.depth` for a pass that has its own m, and a mask of the class that dominates. This method uses a
        select, so it is for elementwise passes: on a CPU, a select inside a sum isn't free."""
        d = x - backend.column(m)
        dominant = d > backend.column(self.undominated - 0.5)
        return jnp.where(dominant, jnp.zeros_like(d), d), dominant


class Exponentials(NamedTuple):
    """eᵢ and Z, for a kernel whose result is an array computed from eᵢ; and the normalizer."""

    e: Array
    z: Array
    of_row: Normalizer


class Compared(NamedTuple):
    """For one of the two rows that a pass of `compare.compare` reads: m, qᵢ, and a mask of the class that dominates."""

    m: Array
    q: Array
    dominant: Array


class Deviation(NamedTuple):
    """eᵢ, Z, tᵢ - Σⱼ qⱼtⱼ, Σⱼ qⱼtⱼ, and Σᵢ aᵢqᵢ (tᵢ - Σⱼ qⱼtⱼ) as a function of any a with Σᵢ aᵢqᵢ = 0."""

    e: Array
    z: Array
    deviations: Array
    mean: Array
    covariance: Callable[[Array], Array]
