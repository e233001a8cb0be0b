"""`Layout`: how arrays are split over the devices of a mesh, by their types (under Explicit axes) or by the caller.

If two operands are split differently, JAX raises an error, unless it is told how to split the result. And a derivative
must be split like its argument. So all arguments of a function are first split in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

try:  # Until JAX no longer hides which spmd_axis_name are around (0.8 to 0.12): a private import.
    from jax._src.core import get_axis_env
except ImportError:  # gradients under spmd_axis_name then raise JAX's own error
    get_axis_env = None


class Layout(NamedTuple):
    """A shape, and the mesh axes over which each of its axes is split.

    `mesh` is None if types say nothing about a split: on one device, under Auto axes (where XLA chooses), and inside
    `jax.shard_map`.
    """

    shape: tuple[int, ...]
    mesh: Mesh | AbstractMesh | None
    spec: tuple

    @classmethod
    def of(cls, shape: tuple[int, ...], arrays: Sequence[Array]) -> Layout:
        """The layout of a shape. Arrays must either broadcast to it or have it as their first axes.

        Each axis is split like the same axis of an array that splits it. If two arrays disagree, the first one counts.
        """
        spec, mesh = [None] * len(shape), None
        for x in arrays:
            sharding = jax.typeof(x).sharding
            for at, axes in zip(range(max(0, len(shape) - x.ndim), len(shape)), sharding.spec, strict=False):
                if axes is not None and spec[at] is None and not set(mesh_names(axes)) & set(mesh_names(*spec)):
                    spec[at], mesh = axes, sharding.mesh
        return cls(shape, mesh, tuple(spec))

    @classmethod
    def said(cls, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, spec: P) -> Layout:
        """The layout of a shape whose first axes are split by a spec. Only its Explicit mesh axes count, since types
        don't mention others."""
        types = explicit_axes(mesh)
        split = [tuple(name for name in mesh_names(axes) if name in types) or None for axes in spec]
        return cls(shape, mesh if types else None, (*split, *[None] * (len(shape) - len(split))))

    def without(self, axis: int) -> Layout:
        shape, spec = list(self.shape), list(self.spec)
        del shape[axis], spec[axis]
        return Layout(tuple(shape), self.mesh, tuple(spec))

    @property
    def sharding(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, P(*self.spec))

    def broadcast(self, x: Array) -> Array:
        """x, broadcast to this shape and split like this layout.

        x is split before it is broadcast. So its cotangent is first summed over devices and then split as x was,
        instead of being gathered.
        """
        mesh = self.mesh or Layout.of(x.shape, [x]).mesh  # if x is split and the layout isn't, x is gathered
        if mesh is None:
            return jnp.broadcast_to(x, self.shape)
        first = len(self.shape) - x.ndim
        lengths = zip(x.shape, self.shape[first:], self.spec[first:], strict=True)
        own = tuple(axes if n == whole else None for n, whole, axes in lengths)
        if own != Layout.of(x.shape, [x]).spec:  # if x is split so already, resharding would be a needless copy
            x = jax.sharding.reshard(x, NamedSharding(mesh, P(*own)))
        return jnp.broadcast_to(x, self.shape, out_sharding=NamedSharding(mesh, P(*self.spec)))


def split_alike(*arrays: Array) -> list[Array]:
    """Arrays of the same shape, all split like their common layout."""
    layout = Layout.of(arrays[0].shape, arrays)
    return [layout.broadcast(x) for x in arrays]


def over_devices(part: Array, mesh_axes: tuple) -> Array:
    """Inside `jax.shard_map`, the sum of the parts of all devices."""
    return lax.psum(part, mesh_axes) if mesh_axes else part


def mesh_names(*spec) -> tuple:
    """The names of the mesh axes in these entries of a spec."""
    return tuple(name for axes in spec for name in (axes if isinstance(axes, tuple) else (axes,)) if name is not None)


def manual_axes() -> tuple:
    """The mesh axes of the `jax.shard_map`s around the call."""
    return jax.sharding.get_abstract_mesh().manual_axes


def split_batch_axes() -> frozenset:
    """The mesh axes that split the batches of the `jax.vmap`s around the call, by spmd_axis_name."""
    return frozenset() if get_axis_env is None else get_axis_env().spmd_axis_names


def auto_devices() -> int:
    """The number of devices over which XLA may split arrays: the product of the current mesh's Auto axes, or 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(
        mesh.shape[n] for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto
    )


def may_be_split(x: Array) -> bool:
    """Whether rows of x may be on several devices, by types or by XLA's choice. To compute one number from all rows,
    devices must then communicate."""
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    kinds = [(m.shape[n], kind) for m in meshes for n, kind in zip(m.axis_names, m.axis_types, strict=True)]
    return any(size > 1 and kind != AxisType.Manual for size, kind in kinds)


def told_axes(mesh: Mesh | AbstractMesh | None) -> frozenset:
    """The Explicit axes of a mesh, for the `axis_names` of `jax.shard_map`. If all axes are Explicit, the set is empty:
    for `jax.shard_map` that means all axes except those of a `jax.vmap` around it."""
    assert mesh is not None
    explicit = explicit_axes(mesh)
    return frozenset() if explicit == {*mesh.axis_names} else explicit


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset:
    return frozenset(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
