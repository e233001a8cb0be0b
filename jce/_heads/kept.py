"""Tokens that are left out cost nothing: those that are kept are put together, and only their chunks are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.first_chunks import first_chunks
from jce._primitives import batch_axis_first, primitive, with_zeros


def over_kept(step: Callable, kept: Array, chunks: int, devices: int, tokens: Any, size: int | None = None) -> Any:
    """The sums of step(None, a chunk) and each token's results, which are 0 for one that isn't kept.

    Those that are kept come first, and then zeros. Where XLA splits the tokens over devices, so it is in each one's
    share, and a chunk has some of each, so that none is sent. Of a size that is said, that of such a part, all chunks
    are alike: XLA doesn't see how many there are, and compiles one like many.
    """
    (count, *_), n, alike = kept.shape, -(-kept.shape[0] // devices), size is not None
    size = -(-n // chunks) if size is None else size

    def shares(x):
        return filled(x, devices * n).reshape(devices, n, *x.shape[1:])

    kept = shares(kept)
    order = _Order.of(kept, chunks * size)

    def split(x):
        x = _taken(shares(x), *order).reshape(devices, chunks, size, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(chunks, devices * size, *x.shape[3:])

    def join(x):
        x = x.reshape(chunks, devices, size, *x.shape[2:]).swapaxes(0, 1)
        x = _taken(x.reshape(devices, chunks * size, *x.shape[3:]), order.back, order.there)
        return x.reshape(devices * n, *x.shape[2:])[:count]

    needed = -(-kept.sum(1, dtype=jnp.int32).max() // size)
    if alike:
        needed = lax.optimization_barrier(needed)
    sums, results = first_chunks(step, needed, jax.tree.map(split, tokens))
    return sums, jax.tree.map(join, results)


class _Order(NamedTuple):
    """Of tokens [shares, n], of which those that are kept come first, as they came."""

    there: Array  # [shares, m], which token is the i-th; n for none
    back: Array  # [shares, n], in which place a token is; m for one that isn't kept

    @classmethod
    def of(cls, kept: Array, m: int) -> _Order:
        n, before = kept.shape[1], jnp.cumsum(kept, 1, dtype=jnp.int32)
        there = jnp.sort(jnp.where(kept, lax.broadcasted_iota(jnp.int32, kept.shape, 1), jnp.full_like(before, n)), 1)
        return cls(
            jnp.pad(there, ((0, 0), (0, m - n)), constant_values=n),
            jnp.where(kept, before - 1, jnp.full_like(before, m)),
        )


def filled(x: Array, length: int) -> Array:
    """As long, with zeros behind."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys, of which there is no 0
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (length - x.shape[0], *x.shape[1:]))])
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


# Some of an array's elements in another order, and zeros for what is none: linear, and the transpose is the way back.
# A gather, whose own transpose is a scatter that a GPU adds up in any order.


def _taken(x: Array, there: Array, back: Array) -> Array:
    """Of x [shares, n, ...] those at [shares, m]; more axes may come first."""
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


# Weights


def counts(w: Array) -> Array:
    """Whether a token of this weight leaves anything: w ≠ 0, but all do where a weight has a derivative.

    That is the token's loss, also at 0. Who differentiates shows when they do: hence a primitive, whose rule this is.
    """
    return _counts_p.bind(w)


def _counts_rule(primals, _):
    every = counts(*primals) | True
    return every, *with_zeros([every], [])


_counts_p = primitive("counts", lambda w: w != 0, _counts_rule)
