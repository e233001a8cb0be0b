"""A function of tokens that, under `jax.vmap`, computes the tokens of the whole batch in one loop.

By JAX's own rule, each step of a batched loop would take one chunk of every batch member, and the head's gradient would
be summed separately for each member. So a function of tokens is a primitive. When it is lowered or differentiated, it
is replaced by its computation. When it is batched over tokens, and not over the head, the tokens of all members are
merged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify

from jce._jax.primitives import batch_axis_first, derivative_inside, evaluated_jaxpr, primitive


def with_merged_batches(per_token: Callable, tokens: tuple[Any, ...], shared: tuple, sums: Callable | None = None):
    """Returns per_token(*tokens, *shared), the results per token. Or, if `sums` is given, sums(*tokens, *shared): the
    sums of these results over tokens, with their gradient from the same loop. (If a batch is differentiated, the
    gradient comes from the loop of `per_token` instead.) The first of `tokens` are hidden states. Neither function may
    close over traced values.
    """
    leaves, tree = jax.tree.flatten((tokens, shared))

    def flat(*leaves):
        tokens, shared = tree.unflatten(leaves)
        return (sums or per_token)(*tokens, *shared)

    jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    results = _merged_p.bind(*leaves, jaxpr=jaxpr, per_token=per_token, sums=sums, tree=tree)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _batch(arguments, axes, *, jaxpr, per_token, sums, tree):
    count = tree.children()[0].num_leaves
    tokens = arguments[:count]
    if axes[0] is None or any(axis is not None for axis in axes[count:]):
        results = jax.vmap(lambda *a: evaluated_jaxpr(*a, jaxpr=jaxpr), axes)(*arguments)
        return results, (0,) * len(results)
    size = tokens[0].shape[axes[0]]

    merged = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in batch_axis_first(tokens, axes[:count])]
    more, shared = tree.unflatten([*merged, *arguments[count:]])
    results = jax.tree.leaves(with_merged_batches(per_token, more, shared))
    results = [x.reshape(size, -1, *x.shape[1:]) for x in results]
    return [x.sum(1) for x in results] if sums else results, (0,) * len(results)


def _checked(errors, *arrays, jaxpr, **_):
    return checkify.checkify(jax.jit(functools.partial(evaluated_jaxpr, jaxpr=jaxpr)), errors=errors)(*arrays)


_merged_p = primitive(
    "merged_batches",
    evaluated_jaxpr,
    derivative_inside,
    batch=_batch,
    types=lambda *_, jaxpr, **__: jaxpr.out_avals,
    several=True,
    holds_arrays=True,
    checked=_checked,
)
