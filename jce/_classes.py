"""Where the classes are: along an axis and, inside `jax.shard_map`, some on each device of a mesh axis.

On a CPU long rows are folded: n classes along an axis become k blocks of n/k along two. There XLA sums rows of more
than 32,768 float32 numbers 3 to 13 times as slowly as shorter ones (JAX 0.10 and 0.12).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jce._layout import Layout, mesh_names, over_devices, told_axes
from jce._platforms import Way, per_platform
from jce._row_sum import row_sum

LONGEST_ROW = 32_768  # classes in float32, and half as many in float64; longer ones are folded
LONG_ROW = 128  # fewer classes are few
SHORTEST_BLOCK = 512


class Classes(NamedTuple):
    """The n classes along `axis` < 0 of each array; with a mesh axis, each of its devices holds some of them.

    Static, and the only thing that knows whether a sum over classes is one over devices or blocks too.
    """

    axis: int
    mesh_axis: Hashable | None = None
    blocks: int = 1  # folded, their axis is the one before
    way: Way | None = None  # of the platform, once it is known

    @property
    def masks(self) -> bool:
        """Whether a select in a sum costs nothing."""
        return self.way in (Way.REDUCTION, Way.CHAIN)

    def folding(self, x: Array) -> Classes:
        """These classes on a CPU, with as many blocks as suit arrays like x, which aren't folded yet.

        A sharded row stays where it is if the number of devices divides that of blocks: hence many, in powers of 2. JAX
        admits no reshape of an axis whose type says that it is sharded.
        """
        n, known = x.shape[self.axis], self._replace(way=Way.PASSES)
        if n <= _longest_row(x) or self.are_split(x):
            return known
        fit = [k for k in range(2, n // SHORTEST_BLOCK + 1) if n % k == 0 and n // k <= _longest_row(x)]
        return known._replace(blocks=max(fit, key=lambda k: (k & -k, k), default=1))

    def fold(self, x: Array) -> Array:
        """[..., n, ...] as [..., blocks, n/blocks, ...]"""
        at = x.ndim + self.axis
        return x if self.blocks == 1 else x.reshape(*x.shape[:at], self.blocks, -1, *x.shape[at + 1 :])

    def unfold(self, x: Array) -> Array:
        at = x.ndim + self.axis
        return x if self.blocks == 1 else x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])

    def are_split(self, x: Array) -> bool:
        """Whether an array's type says that its classes are split over devices: over an Explicit axis of a mesh."""
        return jax.typeof(x).sharding.spec[x.ndim + self.axis] is not None

    def reduce(self, reduction: Callable, x):
        """reduction(x, axis), of blocks and then of what they gave."""
        first = jax.tree.leaves(x)[0]
        if self.way is None and first.shape[self.axis] > _longest_row(first):
            return per_platform(_Reduced(reduction))(x, self)
        x = reduction(x, self.axis)
        # Without the barrier XLA makes one reduction of the two again.
        return x if self.blocks == 1 else reduction(lax.optimization_barrier(x), self.axis)

    def sum(self, x: Array) -> Array:
        """Σᵢ xᵢ, a number a row, the same on all devices."""
        return self.over_devices(self.reduce(row_sum, x))

    def over_devices(self, part: Array) -> Array:
        """The sum of each device's part."""
        return over_devices(part, mesh_names(self.mesh_axis))

    @property
    def mesh_axes(self) -> frozenset:
        if self.mesh_axis is None:
            return frozenset()
        return frozenset(self.mesh_axis if isinstance(self.mesh_axis, tuple) else (self.mesh_axis,))

    def max(self, x: Array) -> Array:
        """max xᵢ; not differentiable over devices."""
        m = self.reduce(jnp.max, x)
        return m if self.mesh_axis is None else lax.pmax(lax.stop_gradient(m), self.mesh_axis)

    def any(self, x: Array) -> Array:
        if self.mesh_axis is None:
            return self.reduce(jnp.any, x)
        return self.max(x.astype(jnp.int32)) > 0

    def column(self, r: Array) -> Array:
        """A number a row, to be broadcast along the classes."""
        r = jnp.expand_dims(r, self.axis)
        return r if self.blocks == 1 else jnp.expand_dims(r, self.axis)

    def count(self, x: Array) -> int:
        """n, on all devices."""
        return self.count_here(x) * (1 if self.mesh_axis is None else lax.axis_size(self.mesh_axis))

    def count_here(self, x: Array) -> int:
        """How many of the n classes this device has."""
        return self.blocks * x.shape[self.axis]

    def are_few(self, x: Array) -> bool:
        """Whether rows are so short that on a CPU other operations are cheap, as `_softmax.py` says."""
        return self.count_here(x) < LONG_ROW

    def lowest(self, x: Array) -> Array:
        """The lowest number; of few classes made of x, for where it meets a result."""
        least = jnp.finfo(x.dtype).min
        return jnp.minimum(x, least) if self.are_few(x) else jnp.full((), least, x.dtype)

    def local(self, labels: Array, x: Array) -> Array:
        """Labels as counted from this device's first class."""
        if self.mesh_axis is None:
            return labels
        return labels.astype(jnp.int32) - lax.axis_index(self.mesh_axis) * self.count_here(x)

    def at(self, x: Array, y: Array) -> Array:
        """x at a local label, from the device that has it; at a label out of range, whatever."""
        if self.are_split(x):
            there = self._at_of_split(x, y)
        else:
            y_ = jnp.expand_dims(y, self.axis)
            there = jnp.take_along_axis(self.unfold(x), y_, self.axis, mode="clip").squeeze(self.axis)
        if self.mesh_axis is None:
            return there
        return self.over_devices(jnp.where(self.has(x, y), there, jnp.zeros_like(there)))

    def at_by_mask(self, x: Array, y: Array) -> Array:
        """The same as a sum, which reads all of x."""
        return self.sum(jnp.where(self.is_at(x, y), x, jnp.zeros_like(x)))

    def _at_of_split(self, x: Array, y: Array) -> Array:
        """The same where types say that the classes are split: JAX looks nothing up along such an axis."""
        layout = Layout.of(x.shape, [x])
        rows, here = layout.without(self.axis), Classes(self.axis, layout.spec[self.axis])
        return jax.shard_map(
            lambda x, y: here.at(x, here.local(y, x)),
            mesh=layout.mesh,
            in_specs=(P(*layout.spec), P(*rows.spec)),
            out_specs=P(*rows.spec),
            axis_names=told_axes(layout.mesh),
        )(x, rows.place(y))

    def put(self, x: Array, y: Array, r: Array) -> Array:
        """x, not folded, with a number a row in the place of a local label's."""
        if self.masks:
            return jnp.where(self.is_at(x, y), self.column(r), x)
        y = jnp.where(self.has(x, y), y, jnp.full_like(y, x.shape[-1]))  # a negative index would count
        return x.at[jnp.arange(y.size), y].set(r, mode="drop")

    def each(self, r: Array, x: Array) -> Array:
        """A number a row, for each class of x, and split as x is."""
        return Layout.of(x.shape, [x]).place(self.column(r))

    def has(self, x: Array, y: Array) -> Array:
        """Whether local labels are among this device's classes."""
        return (y >= 0) & (y < self.count_here(x))

    def is_at(self, x: Array, y: Array) -> Array:
        """Which entries of x are those of local labels."""
        at, like_x = x.ndim + self.axis, Layout.of(x.shape, [x]).sharding
        i = lax.broadcasted_iota(y.dtype, x.shape, at, out_sharding=like_x)
        if self.blocks > 1:
            i += x.shape[at] * lax.broadcasted_iota(y.dtype, x.shape, at - 1, out_sharding=like_x)
        return i == self.column(y)


def _longest_row(x: Array) -> int:
    return LONGEST_ROW // 2 if x.dtype == jnp.float64 else LONGEST_ROW


@dataclasses.dataclass(frozen=True)
class _Reduced:
    reduction: Callable

    def __call__(self, x, classes: Classes):
        return classes.reduce(self.reduction, x)


def varying_alike(*arrays: Array) -> list[Array]:
    """Inside `jax.shard_map`, where an array's type says over which mesh axes it varies, all over those of any."""
    return vary_over(frozenset().union(*map(varying, arrays)), *arrays)


def vary_over(axes: frozenset, *arrays: Array) -> list[Array]:
    missing = [tuple(sorted(axes - varying(x))) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing, strict=True)]


def like(number: Array, x: Array) -> Array:
    """The number in an array of x's shape, which varies as x does: before it is one, so that its gradient is summed
    before devices send it."""
    return jnp.broadcast_to(vary_over(varying(x), number)[0], x.shape)


def varying(x: Array) -> frozenset:
    """The mesh axes over which an array's type says that it varies."""
    return varying_type(jax.typeof(x))


def varying_type(t) -> frozenset:
    return t.vma if hasattr(t, "vma") else t.manual_axis_type.varying
