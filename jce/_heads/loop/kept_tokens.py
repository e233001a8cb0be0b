"""Skips masked tokens: the kept tokens are moved to the front, and only their chunks are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.loop.first_chunks import first_chunks
from jce._jax.primitives import batch_axis_first, primitive


def over_kept(step: Callable, kept: Array, chunks: int, devices: int, tokens: Any, size: int | None = None) -> Any:
    """The sums of step(None, chunk) over chunks, and the results per token, which are 0 for a masked token.

    Kept tokens are moved to the front, with zeros after them. If XLA splits the tokens over devices, this is done on
    each device, and a chunk takes an equal part from each device, so no token is sent. `size` is the number of tokens
    in such a part. If `size` is given, the results of a token have the same bits in any number of chunks: XLA might
    compile a single chunk differently from many, so a barrier hides the number of chunks from XLA.
    """
    count, filled = kept.shape[0], size is not None
    n = -(-count // devices)
    size = -(-n // chunks) if size is None else size

    def by_device(x):
        return padded(x, devices * n).reshape(devices, n, *x.shape[1:])

    kept = by_device(kept)
    order = _Order.of(kept, chunks * size)

    def split(x):
        x = _taken(by_device(x), *order).reshape(devices, chunks, size, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(chunks, devices * size, *x.shape[3:])

    def join(x):
        x = x.reshape(chunks, devices, size, *x.shape[2:]).swapaxes(0, 1)
        x = _taken(x.reshape(devices, chunks * size, *x.shape[3:]), order.back, order.there)
        return x.reshape(devices * n, *x.shape[2:])[:count]

    needed = -(-kept.sum(1, dtype=jnp.int32).max() // size)
    if filled:
        needed = lax.optimization_barrier(needed)
    sums, results = first_chunks(step, needed, jax.tree.map(split, tokens))
    return sums, jax.tree.map(join, results)


class _Order(NamedTuple):
    """An order of tokens [devices, n] in which the kept tokens come first, in their original order."""

    there: Array  # [devices, m], the token in each place; n for an empty place
    back: Array  # [devices, n], the place of each token; m for a masked token

    @classmethod
    def of(cls, kept: Array, m: int) -> _Order:
        n, before = kept.shape[1], jnp.cumsum(kept, 1, dtype=jnp.int32)
        there = jnp.sort(jnp.where(kept, lax.broadcasted_iota(jnp.int32, kept.shape, 1), jnp.full_like(before, n)), 1)
        return cls(
            jnp.pad(there, ((0, 0), (0, m - n)), constant_values=n),
            jnp.where(kept, before - 1, jnp.full_like(before, m)),
        )


def padded(x: Array, length: int) -> Array:
    """x, padded with zeros to this length."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys have no 0, so they are padded with the first key
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (length - x.shape[0], *x.shape[1:]))])
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


# A gather, with zeros for empty places. JAX would transpose it to a scatter. A GPU sums a scatter in any order, so bits
# would change from run to run. Here no element is taken twice, so the transpose is a gather too, with `there` and
# `back` exchanged.


def _taken(x: Array, there: Array, back: Array) -> Array:
    """The elements of x [devices, n, ...] at the indices `there` [devices, m]. `back` [devices, n] is the inverse of
    `there`. All three arrays may have more leading axes."""
    return _taken_p.bind(x, there, back)


def _take(x, there, _):
    def take(x, at):
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x.at[at].get(mode="clip")
        return x.at[at].get(mode="fill", fill_value=0)

    for _ in there.shape[1:]:
        take = jax.vmap(take)
    return take(x, there)


def _taken_batch(arguments, axes):
    (x, *order), (axis, *of_order) = arguments, axes
    if of_order == [None, None]:
        leading = order[0].ndim
        return _taken(jnp.moveaxis(x, axis, leading), *order), leading
    return _taken(*batch_axis_first(arguments, axes)), 0


_taken_p = primitive(
    "taken",
    _take,
    (lambda t, _, *order: _taken(t, *order), None, None),
    (lambda ct, _, there, back: _taken(ct, back, there),),
    _taken_batch,
)
