"""Where the classes are: along an axis and, inside `jax.shard_map`, in blocks on the devices of a mesh axis."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Classes(NamedTuple):
    """The n classes along `axis` < 0 of each array; with a mesh axis, each of its devices holds a block of them.

    Static, and the only thing that knows whether a sum over classes is one over devices too.
    """

    axis: int
    mesh_axis: Hashable | None = None

    def sum(self, x: Array) -> Array:
        """Σᵢ xᵢ, a number a row, the same on all devices."""
        return self.over_devices(x.sum(self.axis))

    def over_devices(self, part: Array) -> Array:
        """The sum of each device's part."""
        return part if self.mesh_axis is None else lax.psum(part, self.mesh_axis)

    @property
    def mesh_axes(self) -> frozenset:
        if self.mesh_axis is None:
            return frozenset()
        return frozenset(self.mesh_axis if isinstance(self.mesh_axis, tuple) else (self.mesh_axis,))

    def max(self, x: Array) -> Array:
        """max xᵢ; not differentiable over devices."""
        m = x.max(self.axis)
        return m if self.mesh_axis is None else lax.pmax(lax.stop_gradient(m), self.mesh_axis)

    def any(self, x: Array) -> Array:
        if self.mesh_axis is None:
            return x.any(self.axis)
        return self.max(x.astype(jnp.int32)) > 0

    def column(self, r: Array) -> Array:
        """A number a row, to be broadcast along the classes."""
        return jnp.expand_dims(r, self.axis)

    def count(self, x: Array) -> int:
        """n, of x and of its other blocks."""
        return x.shape[self.axis] * (1 if self.mesh_axis is None else lax.axis_size(self.mesh_axis))

    def local(self, labels: Array, x: Array) -> Array:
        """Labels as counted from the first class of this device's block of x."""
        if self.mesh_axis is None:
            return labels
        return labels.astype(jnp.int32) - lax.axis_index(self.mesh_axis) * x.shape[self.axis]

    def at(self, x: Array, y: Array) -> Array:
        """x at a local label, from the device that has it; at a label out of range, whatever."""
        there = jnp.take_along_axis(x, self.column(y), self.axis, mode="clip").squeeze(self.axis)
        if self.mesh_axis is None:
            return there
        return self.over_devices(jnp.where(self.has(x, y), there, jnp.zeros_like(there)))

    def has(self, x: Array, y: Array) -> Array:
        """Whether local labels are in this device's block of x."""
        return (y >= 0) & (y < x.shape[self.axis])

    def is_at(self, x: Array, y: Array) -> Array:
        """Which entries of x are those of local labels."""
        return lax.broadcasted_iota(y.dtype, x.shape, x.ndim + self.axis) == self.column(y)


def varying_alike(*arrays: Array) -> list[Array]:
    """Inside `jax.shard_map`, where an array's type says over which mesh axes it varies, all over those of any."""
    return vary_over(frozenset().union(*map(varying, arrays)), *arrays)


def vary_over(axes: frozenset, *arrays: Array) -> list[Array]:
    missing = [tuple(sorted(axes - varying(x))) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing, strict=True)]


def varying(x: Array) -> frozenset:
    """The mesh axes over which an array's type says that it varies."""
    t = jax.typeof(x)
    return t.vma if hasattr(t, "vma") else t.manual_axis_type.varying
