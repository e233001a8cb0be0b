"""How arrays are split over the devices of a mesh: by JAX's types, under Explicit axes, or as it is said.

Where two arrays are split in unlike ways, JAX wants to be told how what is made of them is, and a derivative must come
back split as its argument is. So the arguments of a function are first placed alike: what follows needs no telling.
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

try:  # nothing public tells of spmd_axis_name (JAX 0.8 to 0.12)
    from jax._src.core import get_axis_env
except ImportError:  # then gradients under it end in JAX's own error
    get_axis_env = None


class Layout(NamedTuple):
    """A shape, and the mesh axes over which each of its axes is split.

    Without a mesh nothing is: on one device, under Auto axes, where XLA chooses, and inside `jax.shard_map`.
    """

    shape: tuple[int, ...]
    mesh: Mesh | AbstractMesh | None
    spec: tuple

    @classmethod
    def of(cls, shape: tuple[int, ...], arrays: Sequence[Array]) -> Layout:
        """Of arrays that broadcast to a shape, or begin with it.

        An axis is split as one of them is, the first where two disagree.
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
        """By the spec of a shape's first axes, as far as a type can say it."""
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

    def place(self, x: Array) -> Array:
        """x broadcast to the shape and split so.

        Its own axes are split first. So its cotangent is summed over devices, not gathered, and comes back as x came.
        """
        mesh = self.mesh or Layout.of(x.shape, [x]).mesh  # what is split, in a layout that isn't, is gathered
        if mesh is None:
            return jnp.broadcast_to(x, self.shape)
        tail = len(self.shape) - x.ndim
        lengths = zip(x.shape, self.shape[tail:], self.spec[tail:], strict=True)
        own = tuple(axes if n == whole else None for n, whole, axes in lengths)
        if own != Layout.of(x.shape, [x]).spec:  # else it would be a copy
            x = jax.sharding.reshard(x, NamedSharding(mesh, P(*own)))
        return jnp.broadcast_to(x, self.shape, out_sharding=NamedSharding(mesh, P(*self.spec)))


def split_alike(*arrays: Array) -> list[Array]:
    """Arrays of one shape."""
    layout = Layout.of(arrays[0].shape, arrays)
    return [layout.place(x) for x in arrays]


def over_devices(part: Array, mesh_axes: tuple) -> Array:
    """Inside `jax.shard_map`, the sum of each device's part."""
    return lax.psum(part, mesh_axes) if mesh_axes else part


def mesh_names(*spec) -> tuple:
    """The mesh axes in some entries of a spec."""
    return tuple(name for axes in spec for name in (axes if isinstance(axes, tuple) else (axes,)) if name is not None)


def manual_axes() -> tuple:
    """The mesh axes of the `jax.shard_map`s around, of whose arrays each device has its part."""
    return jax.sharding.get_abstract_mesh().manual_axes


def split_batch_axes() -> frozenset:
    """The mesh axes over which the `jax.vmap`s around split their batches, by spmd_axis_name."""
    return frozenset() if get_axis_env is None else get_axis_env().spmd_axis_names


def auto_devices() -> int:
    """Over how many devices XLA may split what there is, under the Auto axes of the mesh that is set: 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(
        mesh.shape[n] for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto
    )


def may_be_split(x: Array) -> bool:
    """Whether rows of x may lie on several devices, by types or as XLA chooses: a number of all rows is then sent."""
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    kinds = [(m.shape[n], kind) for m in meshes for n, kind in zip(m.axis_names, m.axis_types, strict=True)]
    return any(size > 1 and kind != AxisType.Manual for size, kind in kinds)


def told_axes(mesh: Mesh | AbstractMesh | None) -> frozenset:
    """The axes of which types tell, for a `jax.shard_map`; empty for all, which there means all but a `jax.vmap`'s."""
    assert mesh is not None
    explicit = explicit_axes(mesh)
    return frozenset() if explicit == {*mesh.axis_names} else explicit


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset:
    return frozenset(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
