"""`Classes`: the axis of the classes and, inside `jax.shard_map`, the mesh axis that splits them over devices.

On a CPU, long rows are folded: the axis of n classes becomes two axes, of k blocks and of n/k classes per block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jce._jax.layout import Layout, mesh_names, over_devices, told_axes
from jce._jax.platforms import named
from jce._jax.row_sum import row_sum
from jce._jax.waiting import Program, waiting

# Until JAX no longer sums longer float32 rows more slowly on a CPU (0.10 and 0.12: 3 to 13 times as long per number):
# fold longer rows there. (float64 rows are folded if they are longer than half of this.)
LONGEST_ROW = 32_768
LONG_ROW = 128  # a row of fewer classes is short (`Classes.are_few`)
SHORTEST_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Classes:
    """The n classes along `axis` < 0 of each array. With a mesh axis, each device along it holds some of the classes.

    A `Classes` is static. No other code needs to know whether a sum over classes is also a sum over devices or blocks.
    `any_shift` says whether the formula of a label may subtract a number other than the maximum from logits, which
    saves a pass. It is False if another formula computes the maximum of the same logits anyway: both then share it.
    """

    axis: int
    mesh_axis: Hashable | None = None
    blocks: int = 1  # the number of blocks in a folded row; the axis of blocks is the one before `axis`
    any_shift: bool = True

    def folding(self, x: Array) -> Classes:
        """These classes on a CPU, with the number of blocks that suits arrays like x, which is not folded yet.

        A sharded row stays where it is if the number of blocks is a multiple of the number of devices. So the number of
        blocks is chosen with the largest possible factor 2ᵏ. Rows whose type says that classes are sharded are not
        folded, because JAX can't reshape them.
        """
        n = x.shape[self.axis]
        if n <= _longest_row(x) or self.are_split(x):
            return self
        fit = [k for k in range(2, n // SHORTEST_BLOCK + 1) if n % k == 0 and n // k <= _longest_row(x)]
        return dataclasses.replace(self, blocks=max(fit, key=lambda k: (k & -k, k), default=1))

    def fold(self, x: Array) -> Array:
        """[..., n, ...] as [..., blocks, n/blocks, ...]"""
        at = x.ndim + self.axis
        return x if self.blocks == 1 else x.reshape(*x.shape[:at], self.blocks, -1, *x.shape[at + 1 :])

    def unfold(self, x: Array) -> Array:
        at = x.ndim + self.axis
        return x if self.blocks == 1 else x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])

    def are_split(self, x: Array) -> bool:
        """Whether the type of x says that its classes are split over devices, along an Explicit mesh axis."""
        return jax.typeof(x).sharding.spec[x.ndim + self.axis] is not None

    def reduce(self, reduction: Callable, x):
        """reduction(x, axis). Long rows wait until the platform is known, and are folded on a CPU."""
        first = jax.tree.leaves(x)[0]
        if first.shape[self.axis] > _longest_row(first):
            return waiting(Program(_reduced, (reduction, self)), x)
        return reduction(x, self.axis)

    def of_blocks(self, reduction: Callable, x):
        """Reduces each block, then the results of the blocks."""
        x = reduction(x, self.axis)
        # Without the barrier, XLA would merge the two reductions into one over the whole row, which is slow.
        return x if self.blocks == 1 else reduction(lax.optimization_barrier(x), self.axis)

    def sum(self, x: Array) -> Array:
        """Σᵢ xᵢ, one number per row, the same on all devices."""
        return self.over_devices(self.reduce(row_sum, x))

    def over_devices(self, part: Array) -> Array:
        """The sum of the parts of all devices."""
        return over_devices(part, mesh_names(self.mesh_axis))

    def max(self, x: Array) -> Array:
        """max xᵢ. It has no derivative if the classes are split over devices."""
        m = self.reduce(jnp.max, x)
        return m if self.mesh_axis is None else lax.pmax(lax.stop_gradient(m), self.mesh_axis)

    def any(self, x: Array) -> Array:
        if self.mesh_axis is None:
            return self.reduce(jnp.any, x)
        return self.max(x.astype(jnp.int32)) > 0

    def column(self, r: Array) -> Array:
        """r, one number per row, with a class axis of length 1."""
        r = jnp.expand_dims(r, self.axis)
        return r if self.blocks == 1 else jnp.expand_dims(r, self.axis)

    def count(self, x: Array) -> int:
        """n: the number of classes on all devices."""
        return self.count_here(x) * (1 if self.mesh_axis is None else lax.axis_size(self.mesh_axis))

    def count_here(self, x: Array) -> int:
        """The number of classes on this device."""
        return self.blocks * x.shape[self.axis]

    def are_few(self, x: Array) -> bool:
        """Whether rows are so short that other operations are the fastest way to sum them on a CPU (`passes.py`)."""
        return self.count_here(x) < LONG_ROW

    # In a sum, 0 · ∞ must be 0, and on a CPU a select would cost a pass. So the factor of p is made finite where p = 0.
    #
    # Until JAX no longer loses a NaN in maxima of large arrays on a CPU (0.10 to 0.12), or in sums of these:
    # in each formula, a NaN also reaches the result through another term, such as q in q + added below.

    def above_0(self, q: Array, p: Array) -> Array:
        """q, plus the smallest normal number where p = 0. So p log q is 0 where p = q = 0."""
        size = jnp.abs(p)
        added = jnp.maximum(size, jnp.finfo(p.dtype).tiny) - size
        # The second abs changes no value, but without it XLA is slow on a CPU for rows of few classes.
        return q + (jnp.abs(added) if self.are_few(p) else added)

    def lower_bound(self, p: Array) -> Array:
        """A lower bound for a factor of p that may be -∞. The bound is finite at p = 0 and -∞ at any normal p."""
        info = jnp.finfo(p.dtype)
        if self.are_few(p):  # for few classes, a plain constant would make the sum slow
            return -jnp.abs((p * info.max) * jnp.minimum(p, info.min))
        return -info.max * (0.5 + jnp.abs(p) * (1.5 / info.tiny))  # -max/2 at 0; -2 max = -∞ at p = tiny

    def local(self, labels: Array, x: Array) -> Array:
        """Labels counted from this device's first class."""
        if self.mesh_axis is None:
            return labels
        return labels.astype(jnp.int32) - lax.axis_index(self.mesh_axis) * self.count_here(x)

    def at(self, x: Array, y: Array) -> Array:
        """x at the local label y, from the device that has this class. Arbitrary if the label is out of range."""
        if self.are_split(x):
            there = self._at_of_split(x, y)
        else:
            y_ = jnp.expand_dims(y, self.axis)
            there = jnp.take_along_axis(self.unfold(x), y_, self.axis, mode="clip").squeeze(self.axis)
        return self.of_who_has(there, x, y)

    def of_who_has(self, there: Array, x: Array, y: Array) -> Array:
        """`there`, one number per row, from the device whose classes of x include the local label y."""
        if self.mesh_axis is None:
            return there
        return self.over_devices(jnp.where(self.has(x, y), there, jnp.zeros_like(there)))

    def _at_of_split(self, x: Array, y: Array) -> Array:
        """`at`, if the type of x says that the classes are split."""
        # Until JAX no longer refuses lookups along an axis that is split: each device looks up among its own classes.
        layout = Layout.of(x.shape, [x])
        rows, here = layout.without(self.axis), Classes(self.axis, layout.spec[self.axis])
        return jax.shard_map(
            lambda x, y: here.at(x, here.local(y, x)),
            mesh=layout.mesh,
            in_specs=(P(*layout.spec), P(*rows.spec)),
            out_specs=P(*rows.spec),
            axis_names=told_axes(layout.mesh),
        )(x, rows.broadcast(y))

    def broadcast(self, r: Array, x: Array) -> Array:
        """r, one number per row, broadcast to the shape of x and split like x."""
        return Layout.of(x.shape, [x]).broadcast(self.column(r))

    def has(self, x: Array, y: Array) -> Array:
        """Whether local labels are among the classes of this device."""
        return (y >= 0) & (y < self.count_here(x))

    def is_at(self, x: Array, y: Array) -> Array:
        """Which entries of x belong to the local labels y."""
        at, like_x = x.ndim + self.axis, Layout.of(x.shape, [x]).sharding
        i = lax.broadcasted_iota(y.dtype, x.shape, at, out_sharding=like_x)
        if self.blocks > 1:
            i += x.shape[at] * lax.broadcasted_iota(y.dtype, x.shape, at - 1, out_sharding=like_x)
        return i == self.column(y)


def _longest_row(x: Array) -> int:
    return LONGEST_ROW // 2 if x.dtype == jnp.float64 else LONGEST_ROW


def _reduced(reduction: Callable, classes: Classes, platform: str | None, x):
    here = classes.folding(jax.tree.leaves(x)[0]) if named(platform).is_cpu else classes
    return here.of_blocks(reduction, jax.tree.map(here.fold, x))
