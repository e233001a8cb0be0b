"""A loop over the first few chunks of arrays. How many chunks it takes is known only at run time.

Such a loop is a `while`, which reverse mode can't differentiate. But this loop computes only a map over chunks and sums
over chunks. Its tangent is another loop of this kind, and so is its transpose, in which shared arrays become sums, and
sums become shared arrays. So the loop is a primitive whose derivatives and batched form are loops of this kind too. It
keeps no residuals, in any mode, to any order, and JAX can't hoist a part of it out of a loop around it. A `lax.cond` in
a `lax.scan` would be worse: on a GPU, each step copies the array to which a branch may add, here the head's gradient.
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
    """Runs step(None, chunk) for the first `count` chunks of tokens [chunks, ...]. Returns the sums over chunks and the
    results per chunk, which are 0 for the other chunks."""
    leaves, tree = jax.tree.flatten(tokens)
    closed, types = _traced(lambda *chunk: step(None, tree.unflatten(chunk)), leaves, [True] * len(leaves))
    # If the count varies over a mesh axis and a closed-over array doesn't, the gradient of that array is summed over
    # the axis in each step. So all devices along the axis must take equally many steps. Otherwise some devices would
    # wait forever for the others. The same holds for an axis that a step names, for example in a psum.
    own = varying(count)
    unlike = [own - varying(x) for x in closed.consts if jnp.issubdtype(x.dtype, jnp.inexact)]
    named = named_axes(closed.effects)
    if any(map(varying, [*leaves, *closed.consts])):  # otherwise check_vma is False, and types don't say what varies
        named &= own
    count = _largest(count, frozenset(named).union(*unlike))
    sums, results = (len(jax.tree.leaves(x)) for x in types)
    got = _bind(closed, count, leaves, leaves[0].shape[0], [True] * len(leaves), [False] * sums + [True] * results)
    return jax.tree.unflatten(jax.tree.structure(types), got)


def _largest(count: Array, axes: frozenset) -> Array:
    """The largest of the counts of all devices along these mesh axes."""
    return lax.pmax(vary_over(axes, count)[0], tuple(sorted(axes))) if axes else count


def _traced(function: Callable, arrays: Sequence[Array], chunked: Sequence[bool]):
    """The jaxpr of the function, called with one chunk of each `chunked` array and with the other arrays whole, and the
    shapes and dtypes of its results."""

    def first(arrays):
        return [x[0] if is_chunked else x for x, is_chunked in zip(arrays, chunked, strict=True)]

    return jax.make_jaxpr(function, return_shape=True)(*jax.make_jaxpr(first)(list(arrays)).out_avals)


def _bind(closed, count: Array, arrays: Sequence[Array], chunks, chunked: Sequence[bool], results: Sequence[bool]):
    """The results of the loop. `chunked` and `results` say which arrays and which results have an axis of chunks. The
    other arrays are shared by all chunks, and the other results are summed over chunks."""
    chunked = (*chunked, *[False] * len(closed.consts))
    static = {"jaxpr": closed.jaxpr, "chunks": chunks, "chunked": chunked, "results": tuple(results)}
    return _first_chunks_p.bind(count, *arrays, *closed.consts, **static)


def _bind_derived(function: Callable, count: Array, arrays: Sequence[Array], chunks, chunked, results) -> list[Array]:
    """`_bind` for the trace of a function, without the operations on which no result depends."""
    closed, _ = _traced(function, arrays, chunked)
    return _bind(pruned(closed), count, arrays, chunks, chunked, results)


def _step(jaxpr, *arrays: Array) -> list[Array]:
    """The results of a jaxpr, given its arguments and then its constants."""
    number = len(jaxpr.invars)
    return results_of(jaxpr, arrays[number:], arrays[:number])


def _zeros(count: Array, jaxpr, chunks, results: Sequence[bool]) -> list[Array]:
    """The initial carry of the loop. Each array varies over the mesh axes of what is written or added to it, and over
    those of the count."""
    zeros = []
    for i, (v, is_chunked) in enumerate(zip(jaxpr.outvars, results, strict=True)):
        t, shape = v.aval, (chunks, *v.aval.shape) if is_chunked else v.aval.shape
        # If two results began with the same zeros, XLA would copy them. Each of these is 0 because count ≥ 0. XLA can't
        # know that, so it takes them for different values.
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
    # The batch axis comes first, or after the axis of chunks if there is one.
    arrays = [x if k is None else jnp.moveaxis(x, k, int(c)) for x, k, c in zip(arrays, axes, chunked, strict=True)]
    axes = [None if k is None else 0 for k in axes]
    batched = jax.vmap(functools.partial(_step, jaxpr), axes, axis_size=size)
    # Every member of the batch takes as many chunks as the member with the most. Its additional chunks are zeros, like
    # padding.
    most = count if of_count is None else count.max()
    return _bind_derived(batched, most, arrays, chunks, chunked, results), list(map(int, results))


def _checked(errors, count, *arrays, jaxpr, chunks, chunked, results):
    """The loop with checkify's errors as one more result per chunk, so that the loop stays differentiable."""
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
