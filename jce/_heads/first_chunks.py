"""A loop over the first of some chunks: how many they are is known when it runs.

Such a loop is a `while`, which reverse mode can't differentiate. But what it computes is a map of chunks, and sums over
them. Along a tangent that is such a loop again, whose transpose is another: there what was shared is summed, and what
was summed is shared. So it is a primitive, closed under derivatives and batches. Nothing is kept of a chunk, in any
mode to any order, and no loop around takes it apart. A `lax.cond` in a `lax.scan` would be no way: a GPU copies what a
branch may add to, the head's gradient, in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

from jce._classes import vary_over, varying, varying_type
from jce._waiting import Primitive

_first_chunks_p = Primitive("first_chunks")
_first_chunks_p.multiple_results = True


def first_chunks(step: Callable, count: Array, tokens: Any) -> Any:
    """The sums of step(None, chunk) and the chunks' results, of the first of tokens [chunks, ...], and then zeros."""
    leaves, tree = jax.tree.flatten(tokens)

    def function(chunk):
        sums, results = step(None, tree.unflatten(chunk))
        return results, sums

    closed, types = jax.make_jaxpr(function, return_shape=True)(_types_of_first(leaves))
    # What doesn't vary over devices as the count does has a derivative that is summed over them, in each chunk. So they
    # take as many, or one would wait for the others forever; and so where a step itself names them.
    own = varying(count)
    unlike = [own - varying(x) for x in closed.consts if jnp.issubdtype(x.dtype, jnp.inexact)]
    named = {e.name for e in closed.effects if type(e).__name__ == "NamedAxisEffect"}
    if any(map(varying, [*leaves, *closed.consts])):  # which is not so under check_vma=False
        named &= own
    count = _largest(count, frozenset(named).union(*unlike))
    chunks, results = leaves[0].shape[0], len(jax.tree.leaves(types[0]))
    results, sums = jax.tree.unflatten(jax.tree.structure(types), _bind(closed, chunks, results, count, leaves, []))
    return sums, results


def _largest(count: Array, axes: frozenset) -> Array:
    """Of those of the devices of mesh axes."""
    return lax.pmax(vary_over(axes, count)[0], tuple(sorted(axes))) if axes else count


def _types_of_first(tokens: Sequence[Array]) -> list:
    return jax.make_jaxpr(lambda tokens: [x[0] for x in tokens])(list(tokens)).out_avals


def _traced(function: Callable, tokens: Sequence[Array], shared: Sequence[Array]):
    """A function of a chunk and of what is shared, without what its results don't need."""
    closed = jax.make_jaxpr(function)(_types_of_first(tokens), list(map(jax.typeof, shared)))
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return closed.replace(jaxpr=jaxpr)


def _bind(closed, chunks, results: int, count: Array, tokens: Sequence[Array], shared: Sequence[Array]) -> list[Array]:
    """Of one whose first results are a chunk's, and the others to be summed."""
    arrays, number = (*tokens, *shared, *closed.consts), len(tokens)
    return _first_chunks_p.bind(count, *arrays, jaxpr=closed.jaxpr, chunks=chunks, tokens=number, results=results)


def _evaluated(jaxpr, arrays: Sequence[Array]) -> list[Array]:
    """Of a chunk and what is shared, which ends with the constants."""
    number = len(jaxpr.invars)
    return jax.core.eval_jaxpr(jaxpr, arrays[number:], *arrays[:number])


def _zeros(count: Array, jaxpr, chunks, results: int) -> list[Array]:
    """What a loop begins with. It varies over devices as what is written or added does, and as their number."""
    zeros = []
    for i, v in enumerate(jaxpr.outvars):
        t, shape = v.aval, (chunks, *v.aval.shape) if i < results else v.aval.shape
        # Each of its own, as far as XLA knows: of zeros that two results begin with, it makes a copy.
        zero = (count < -i).astype(t.dtype)
        zeros += vary_over(varying_type(t), jnp.broadcast_to(zero, shape))
    return zeros


def _loop(count, *arrays, jaxpr, chunks, tokens, results):
    chunked, shared = arrays[:tokens], arrays[tokens:]

    def body(i, state):
        chunk = [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in chunked]
        new = _evaluated(jaxpr, [*chunk, *shared])
        new = [vary_over(varying(total), x)[0] for total, x in zip(state, new, strict=True)]
        of_chunk = [lax.dynamic_update_index_in_dim(xs, x, i, 0) for xs, x in zip(state[:results], new, strict=False)]
        return of_chunk + [total + x for total, x in zip(state[results:], new[results:], strict=True)]

    return lax.fori_loop(0, count, body, _zeros(count, jaxpr, chunks, results))


def _types(count, *arrays, jaxpr, chunks, tokens, results):
    return jax.make_jaxpr(lambda count: _zeros(count, jaxpr, chunks, results))(count).out_avals


def _run(*arrays, **static):
    # A function of its own, so that no cache of programs keeps what the jaxpr holds.
    return jax.jit(lambda *arrays: _loop(*arrays, **static))(*arrays)


def _differentiate(primals, tangents, *, jaxpr, chunks, tokens, results):
    values = _first_chunks_p.bind(*primals, jaxpr=jaxpr, chunks=chunks, tokens=tokens, results=results)
    (count, *arrays), (_, *steps) = primals, tangents
    live = [i for i, t in enumerate(steps) if type(t) is not ad.Zero]
    real = [i for i, v in enumerate(jaxpr.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    moved = sum(i < tokens for i in live)  # of the tokens

    def along(chunk, shared):
        given = [*chunk[:tokens], *shared[: len(arrays) - tokens]]

        def of_live(*values):
            out = _evaluated(jaxpr, _with(given, live, values))
            return [out[i] for i in real]

        return jax.jvp(of_live, [given[i] for i in live], [*chunk[tokens:], *shared[len(arrays) - tokens :]])[1]

    steps = [steps[i] for i in live]
    chunked, shared = [*arrays[:tokens], *steps[:moved]], [*arrays[tokens:], *steps[moved:]]
    got = _bind(_traced(along, chunked, shared), chunks, sum(i < results for i in real), count, chunked, shared)
    return values, _with([ad.Zero(jax.typeof(x).to_tangent_aval()) for x in values], real, got)


def _transpose(cotangents, count, *arrays, jaxpr, chunks, tokens, results):
    linear = [i for i, x in enumerate(arrays) if ad.is_undefined_primal(x)]
    known = [i for i in range(len(arrays)) if i not in linear]
    some = [i for i, ct in enumerate(cotangents) if type(ct) is not ad.Zero]
    of_tokens, pulled = sum(i < tokens for i in known), sum(i < results for i in some)
    types = [v.aval for v in (*jaxpr.invars, *jaxpr.constvars)]

    def back(chunk, shared):
        values = [*chunk[:of_tokens], *shared[: len(known) - of_tokens]]
        given = _with([None] * len(arrays), known, values)

        def of_linear(*values):
            out = _evaluated(jaxpr, _with(given, linear, values))
            return [out[i] for i in some]

        transposed = jax.linear_transpose(of_linear, *(types[i] for i in linear))
        return transposed([*chunk[of_tokens:], *shared[len(known) - of_tokens :]])

    values, cts = [arrays[i] for i in known], [cotangents[i] for i in some]
    chunked, shared = [*values[:of_tokens], *cts[:pulled]], [*values[of_tokens:], *cts[pulled:]]
    got = _bind(_traced(back, chunked, shared), chunks, sum(i < tokens for i in linear), count, chunked, shared)
    return [None, *_with([None] * len(arrays), linear, got)]


def _with(xs: Sequence, places: Sequence[int], values: Sequence) -> list:
    """xs with others in some places."""
    xs = list(xs)
    for i, x in zip(places, values, strict=True):
        xs[i] = x
    return xs


def _batch(arguments, axes, *, jaxpr, chunks, tokens, results):
    (count, *arrays), (of_count, *axes) = arguments, axes
    size = next(x.shape[a] for x, a in zip(arguments, (of_count, *axes), strict=True) if a is not None)
    places = [int(i < tokens) for i in range(len(arrays))]  # behind the axis of chunks
    arrays = [x if a is None else jnp.moveaxis(x, a, to) for x, a, to in zip(arrays, axes, places, strict=True)]
    axes = [None if a is None else 0 for a in axes]

    def batched(chunk, shared):
        return jax.vmap(lambda *arrays: _evaluated(jaxpr, arrays), axes, axis_size=size)(*chunk, *shared)

    chunked, shared = arrays[:tokens], arrays[tokens:]
    # With the most chunks that a member has; those after its own are zeros, as what fills one up.
    most = count if of_count is None else count.max()
    out = _bind(_traced(batched, chunked, shared), chunks, results, most, chunked, shared)
    return out, [1] * results + [0] * (len(out) - results)


_first_chunks_p.def_impl(_run)
_first_chunks_p.def_abstract_eval(_types)
ad.primitive_jvps[_first_chunks_p] = _differentiate
ad.primitive_transposes[_first_chunks_p] = _transpose
batching.primitive_batchers[_first_chunks_p] = _batch
mlir.register_lowering(_first_chunks_p, mlir.lower_fun(_loop, multiple_results=True))
