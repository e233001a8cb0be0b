"""A loop over the first few chunks of arrays, where their number is known only at run time.

Such a loop is a `while`, which reverse mode can't differentiate. But it computes only a map over chunks, and sums over
them. Its tangent is another such loop, and so is its transpose, in which an array that all chunks share turns into a
sum, and a sum into a shared array. So it is a primitive, closed under derivatives and batching. It keeps no residuals,
in any mode to any order, and no loop around it hoists a part of it. A `lax.cond` in a `lax.scan` wouldn't do: on a GPU
each step copies the array to which a branch may add, the head's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import checkify

from jce._jax.jaxprs import named_axes, pruned, results_of
from jce._jax.primitives import batch_size, primitive
from jce._jax.restricted import all_but, cotangent, linear_in, not_zero, spread, tangent, with_tangents, with_zeros
from jce._jax.varying import vary_over, varying, varying_type


def first_chunks(step: Callable, count: Array, tokens: Any) -> Any:
    """The sums and the chunks' results of step(None, chunk), over the first `count` of tokens [chunks, ...]; the
    results of the other chunks are 0."""
    leaves, tree = jax.tree.flatten(tokens)
    closed, types = _traced(lambda *chunk: step(None, tree.unflatten(chunk)), leaves, [True] * len(leaves))
    # If the count varies over a mesh axis and a closed-over array doesn't, that array's gradient is summed over the
    # axis in each step. So all devices along it must take equally many steps, or one would wait for the others forever.
    # So must devices along an axis that a step names, as in a psum.
    own = varying(count)
    unlike = [own - varying(x) for x in closed.consts if jnp.issubdtype(x.dtype, jnp.inexact)]
    named = named_axes(closed.effects)
    if any(map(varying, [*leaves, *closed.consts])):  # else types don't say what varies: check_vma=False
        named &= own
    count = _largest(count, frozenset(named).union(*unlike))
    sums, results = (len(jax.tree.leaves(x)) for x in types)
    got = _bind(closed, count, leaves, leaves[0].shape[0], [True] * len(leaves), [False] * sums + [True] * results)
    return jax.tree.unflatten(jax.tree.structure(types), got)


def _largest(count: Array, axes: frozenset) -> Array:
    """The largest of the counts of all devices along these mesh axes."""
    return lax.pmax(vary_over(axes, count)[0], tuple(sorted(axes))) if axes else count


def _traced(function: Callable, arrays: Sequence[Array], chunked: Sequence[bool]):
    """The function's jaxpr, for one chunk of the `chunked` arrays and the others whole; and its results' types."""

    def first(arrays):
        return [x[0] if is_chunked else x for x, is_chunked in zip(arrays, chunked, strict=True)]

    return jax.make_jaxpr(function, return_shape=True)(*jax.make_jaxpr(first)(list(arrays)).out_avals)


def _bind(closed, count: Array, arrays: Sequence[Array], chunks, chunked: Sequence[bool], results: Sequence[bool]):
    """The loop's results, where `chunked` and `results` say which arrays and which results have an axis of chunks; the
    other arrays are shared by all chunks, and the other results summed over them."""
    chunked = (*chunked, *[False] * len(closed.consts))
    static = {"jaxpr": closed.jaxpr, "chunks": chunks, "chunked": chunked, "results": tuple(results)}
    return _first_chunks_p.bind(count, *arrays, *closed.consts, **static)


def _bind_derived(function: Callable, count: Array, arrays: Sequence[Array], chunks, chunked, results) -> list[Array]:
    """`_bind` of the trace of a function, from which operations are removed on which no result depends."""
    closed, _ = _traced(function, arrays, chunked)
    return _bind(pruned(closed), count, arrays, chunks, chunked, results)


def _step(jaxpr, *arrays: Array) -> list[Array]:
    """The results of a jaxpr, given its arguments and then its constants."""
    number = len(jaxpr.invars)
    return results_of(jaxpr, arrays[number:], arrays[:number])


def _zeros(count: Array, jaxpr, chunks, results: Sequence[bool]) -> list[Array]:
    """The loop's initial carry. It varies over the mesh axes of what is written or added, and over the count's."""
    zeros = []
    for i, (v, is_chunked) in enumerate(zip(jaxpr.outvars, results, strict=True)):
        t, shape = v.aval, (chunks, *v.aval.shape) if is_chunked else v.aval.shape
        # If two results began with the same zero, XLA would copy it. Each of these is 0 since count ≥ 0, which XLA
        # can't tell, so to XLA they differ.
        zero = (count < -i).astype(t.dtype)
        zeros += vary_over(varying_type(t), jnp.broadcast_to(zero, shape))
    return zeros


def _loop(count, *arrays, jaxpr, chunks, chunked, results):
    def body(i, state):
        pairs = zip(arrays, chunked, strict=True)
        new = _step(jaxpr, *(lax.dynamic_index_in_dim(x, i, keepdims=False) if c else x for x, c in pairs))
        for i_result, (total, x, is_chunked) in enumerate(zip(state, new, results, strict=True)):
            (x,) = vary_over(varying(total), x)
            state[i_result] = lax.dynamic_update_index_in_dim(total, x, i, 0) if is_chunked else total + x
        return state

    return lax.fori_loop(0, count, body, _zeros(count, jaxpr, chunks, results))


def _types(count, *_, jaxpr, chunks, chunked, results):
    return jax.make_jaxpr(lambda count: _zeros(count, jaxpr, chunks, results))(count).out_avals


def _differentiate(primals, tangents, *, jaxpr, chunks, chunked, results):
    values = _first_chunks_p.bind(*primals, jaxpr=jaxpr, chunks=chunks, chunked=chunked, results=results)
    (count, *arrays), (_, *steps) = primals, tangents
    live, moved = not_zero(steps), with_tangents(values)
    tangent_of_step = functools.partial(tangent, functools.partial(_step, jaxpr), live)
    arrays += [steps[i] for i in live]
    chunked += tuple(chunked[i] for i in live)
    return values, with_zeros(
        values, _bind_derived(tangent_of_step, count, arrays, chunks, chunked, [results[i] for i in moved])
    )


def _transpose(cotangents, count, *arrays, jaxpr, chunks, chunked, results):
    linear, nonzero = linear_in(arrays), not_zero(cotangents)
    known, types = all_but(len(arrays), linear), [v.aval for v in (*jaxpr.invars, *jaxpr.constvars)]
    function = functools.partial(_step, jaxpr)
    back = functools.partial(cotangent, function, linear, [types[i] for i in linear], nonzero)
    given = [*(cotangents[i] for i in nonzero), *(arrays[i] for i in known)]
    of_given = [*(results[i] for i in nonzero), *(chunked[i] for i in known)]
    got = _bind_derived(back, count, given, chunks, of_given, [chunked[i] for i in linear])
    return [None, *spread(len(arrays), linear, got)]


def _batch(arguments, axes, *, jaxpr, chunks, chunked, results):
    (count, *arrays), (of_count, *axes) = arguments, axes
    size = batch_size(arguments, (of_count, *axes))
    # The batch's axis comes first, but behind that of chunks.
    arrays = [x if k is None else jnp.moveaxis(x, k, int(c)) for x, k, c in zip(arrays, axes, chunked, strict=True)]
    axes = [None if k is None else 0 for k in axes]
    batched = jax.vmap(functools.partial(_step, jaxpr), axes, axis_size=size)
    # Every member takes as many chunks as the one that has most. Those after its own are zeros, like padding.
    most = count if of_count is None else count.max()
    return _bind_derived(batched, most, arrays, chunks, chunked, results), list(map(int, results))


def _checked(errors, count, *arrays, jaxpr, chunks, chunked, results):
    """checkify's errors are one more result of each chunk, so that the loop stays differentiable."""
    step = checkify.checkify(functools.partial(_step, jaxpr), errors=errors)
    closed, types = _traced(step, arrays, chunked)
    found, structure = jax.tree.flatten(types)
    of_chunks = [True] * (len(found) - len(results)) + list(results)
    return structure.unflatten(_bind(closed, count, arrays, chunks, chunked, of_chunks))


_first_chunks_p = primitive(
    "first_chunks",
    _loop,
    _differentiate,
    _transpose,
    _batch,
    types=_types,
    several=True,
    holds_arrays=True,
    checked=_checked,
)
