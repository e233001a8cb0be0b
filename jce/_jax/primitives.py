"""Makes a primitive of JAX from a plain function and, where they aren't the function's own, its derivative, transpose
and batching rule.

The rest is the same for all primitives: types come from tracing the function, an eager call is jitted, and in a program
the primitive is lowered to the function. The parts from which rules are built are here too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir
from jax.lax import mul_p

try:  # Until JAX no longer hides how checkify is told what to check in a primitive (0.8 to 0.12): a private import.
    from jax._src import checkify
except ImportError:  # then checkify checks nothing in ours
    checkify = None

# Until JAX no longer imports Pallas with `jax.extend.core`, which has this class.
Primitive = type(mul_p)


def primitive(
    name: str,
    function: Callable | dict[str | None, Callable],
    derivative: Callable | Sequence[Callable | None],
    transpose: Callable | Sequence[Callable] = (),
    batch: Callable | None = None,
    *,
    types: Callable | None = None,
    several: bool = False,
    holds_arrays: bool = False,
    checked: Callable | bool = True,
):
    """A primitive that computes function(*arrays, *, static): an array, or a list of arrays if `several`.

    Args:
      function: the function, or a dict of one for each platform, by JAX's names, with None for all other platforms.
      derivative: JAX's JVP rule, (arguments, tangents) -> results and their tangents; or for each argument a function
        (tangent, *arguments) -> its term of the result's tangent, or None where that is 0.
      transpose: JAX's transpose rule, (cotangents, *arguments) -> cotangents; or for each argument in which the
        function is linear a function (cotangent, *arguments) -> its cotangent.
      batch: JAX's batching rule, (arguments, their axes) -> results and their axes. By default that of an elementwise
        function: the same function of arrays with an axis more.
      types: (*types of the arguments) -> types of the results, where that is faster than tracing the function.
      holds_arrays: a static argument is a jaxpr, which may hold arrays: so no cache of programs may keep it alive. The
        primitive has the jaxpr's effects.
      checked: (errors, *arrays, *, static) -> an Error of checkify that reports these errors, or a batch of Errors, and
        the results. By default only the results are checked, for NaN, so that a NaN which the function makes and leaves
        out is no error. False: nothing is checked.
    """
    p = Primitive(name)
    p.multiple_results = several
    functions: dict = function if isinstance(function, dict) else {None: function}
    one, *more = functions.values()
    alone = p.bind if more else one
    keywords = [key for key, x in inspect.signature(one).parameters.items() if x.kind is x.KEYWORD_ONLY]
    jitted = jax.jit(lambda *arrays, **static: alone(*arrays, **static), static_argnames=keywords)

    @p.def_impl
    def run(*arrays, **static):
        if holds_arrays:
            return jax.jit(functools.partial(alone, **static))(*arrays)
        # Under jax.disable_jit `alone`, here p.bind, would call `run` again, forever.
        with jax.disable_jit(False) if more else contextlib.nullcontext():
            return jitted(*arrays, **static)

    def own_types(*avals, **static):
        found = jax.make_jaxpr(functools.partial(one, **static))(*avals).out_avals
        return found if several else found[0]

    def of_each(cotangent, *arrays, **static):
        live, rules = linear_in(arrays), cast(Sequence, transpose)
        if is_zero(cotangent):
            return placed(len(arrays), live, (ad.Zero(arrays[i].aval) for i in live))
        return placed(len(arrays), live, (rules[i](cotangent, *arrays, **static) for i in live))

    def same_of_more(arrays, axes, **static):
        return p.bind(*batch_axis_first(arrays, axes), **static), 0

    def looked_into(*arguments, **static):
        assert checkify is not None
        assert callable(checked)
        at = next(i for i, x in enumerate(arguments) if isinstance(x, frozenset))
        # Until JAX 0.12: it passes no context.
        (*context, error), errors, arrays = arguments[:at], arguments[at], arguments[at + 1 :]
        found, results = checked(errors, *arrays, **static)
        leaves, tree = jax.tree.flatten(found)
        check_error = checkify.check_error
        check = jax.make_jaxpr(lambda *leaves: check_error(tree.unflatten(leaves)))(*leaves)
        error, _ = checkify.checkify_jaxpr(*context, check, errors, error, *leaves)
        return error, results

    # JAX 0.12 under JAX_REMAT3 and similar flags first rewrites a jaxpr's operations, and asks each primitive how.
    p.to_lojax = alone

    @p.def_effectful_abstract_eval
    def types_and_effects(*avals, **static):
        effects = static["jaxpr"].effects if holds_arrays else ()
        # A mutable array inside the function is no effect outside of it.
        effects = {e for e in effects if type(e).__name__ != "InternalMutableArrayEffect"}
        return (types or own_types)(*avals, **static), effects

    if callable(derivative):
        ad.primitive_jvps[p] = derivative
    else:
        ad.defjvp(p, *derivative)
    ad.primitive_transposes[p] = transpose if callable(transpose) else of_each
    batching.primitive_batchers[p] = batch or same_of_more
    if checkify is not None and checked:
        checkify.error_checks[p] = looked_into if callable(checked) else functools.partial(checkify.nan_error_check, p)
    for platform, of_platform in functions.items():
        mlir.register_lowering(p, mlir.lower_fun(of_platform, multiple_results=several), platform=platform)
    return p


# Functions as jaxprs


def evaluated(*arrays: Array, jaxpr, **_) -> list[Array]:
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arrays)


def as_one(function: Callable, static: Sequence[int] = ()) -> Callable:
    """The function as one operation, into which checkify doesn't look: it may make a NaN, or divide by 0, and leave
    that out."""

    @functools.wraps(function)
    def of_all(*arguments):
        places = others(len(arguments), static)
        leaves, tree = jax.tree.flatten([arguments[i] for i in places])
        if not any(isinstance(x, jax.core.Tracer) for x in leaves):
            return function(*arguments)

        def of_leaves(*leaves):
            return function(*replaced(arguments, places, tree.unflatten(leaves)))

        jaxpr, types = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(types), _as_one_p.bind(*leaves, jaxpr=jaxpr))

    return of_all


def _as_one_of_more(arrays, axes, *, jaxpr):
    results = as_one(jax.vmap(functools.partial(evaluated, jaxpr=jaxpr), axes))(*arrays)
    return results, [0] * len(results)


def derivative_inside(primals, tangents, *, jaxpr, **_):
    return live_jvp(functools.partial(evaluated, jaxpr=jaxpr), primals, tangents)


_as_one_p = primitive(
    "as_one",
    evaluated,
    derivative_inside,
    batch=_as_one_of_more,
    types=lambda *_, jaxpr: jaxpr.out_avals,
    several=True,
    holds_arrays=True,
    checked=False,
)


# Batches


def batch_axis_first(arrays: Sequence[Array], axes: Sequence[int | None]) -> list[Array]:
    """The arrays with the batch's axis first; one without such an axis is broadcast."""
    size, pairs = batch_size(arrays, axes), zip(arrays, axes, strict=True)
    return [jnp.broadcast_to(x, (size, *x.shape)) if k is None else jnp.moveaxis(x, k, 0) for x, k in pairs]


def batch_size(arrays: Sequence[Array], axes: Sequence[int | None]) -> int:
    return next(x.shape[k] for x, k in zip(arrays, axes, strict=True) if k is not None)


# Functions restricted to some of their arguments: those that are differentiated, or in which they are linear


def replaced(xs: Iterable, places: Iterable[int], values: Iterable) -> list:
    """xs, with values in these places."""
    xs = list(xs)
    for i, x in zip(places, values, strict=True):
        xs[i] = x
    return xs


def placed(count: int, places: Iterable[int], values: Iterable) -> list:
    """A list of this length with values in these places, and None elsewhere."""
    return replaced([None] * count, places, values)


def of_some(function: Callable, arguments: Sequence, places: Sequence[int]) -> Callable:
    return lambda *values: function(*replaced(arguments, places, values))


def jvp_of_some(function: Callable, primals: Sequence, places: Sequence[int], tangents: Sequence):
    """`jax.jvp` in the primals in these places, along their tangents."""
    return jax.jvp(of_some(function, primals, places), [primals[i] for i in places], list(tangents))


def live_jvp(function: Callable, primals, tangents):
    """`jax.jvp` in the arguments whose tangents aren't symbolic zeros."""
    leaves, tree = jax.tree.flatten(primals)
    tangents = jax.tree.leaves(tangents, is_leaf=is_zero)
    live = not_zero(tangents)
    return jvp_of_some(lambda *leaves: function(*tree.unflatten(leaves)), leaves, live, [tangents[i] for i in live])


def tangent(function: Callable, live: Sequence[int], *arrays: Array) -> list[Array]:
    """The tangents of those results that have one. `arrays` are the arguments, then the tangents of the `live` ones."""
    primals, tangents = arrays[: -len(live)], arrays[-len(live) :]

    def results(*primals):
        leaves = jax.tree.leaves(function(*primals))
        return [leaves[i] for i in with_tangents(leaves)]

    return jvp_of_some(results, primals, live, tangents)[1]


def cotangent(function: Callable, live: Sequence[int], types: Sequence, some: Sequence[int], *arrays: Array):
    """The cotangents of the `live` arguments, in which the function is linear and which have these types. `arrays` are
    the cotangents of `some` results, then the other arguments."""
    cotangents, known = list(arrays[: len(some)]), arrays[len(some) :]
    count = len(known) + len(live)
    arguments = placed(count, others(count, live), known)

    def results(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return [leaves[i] for i in some]

    return jax.linear_transpose(of_some(results, arguments, live), *types)(cotangents)


def others(count: int, places: Sequence[int]) -> list[int]:
    return [i for i in range(count) if i not in places]


def with_tangents(xs: Sequence) -> list[int]:
    """The places of arrays, or types of arrays, that have a tangent: the inexact ones."""
    return [i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.inexact)]


def linear_in(arrays: Sequence) -> tuple[int, ...]:
    """The places of the arguments in which a function is to be transposed."""
    return tuple(i for i, x in enumerate(arrays) if ad.is_undefined_primal(x))


def not_zero(tangents: Sequence) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not is_zero(t))


def is_zero(t) -> bool:
    return isinstance(t, (ad.Zero, SymbolicZero))


def with_zeros(results: Sequence[Array], tangents: Iterable) -> list:
    """The tangents of all results: the given ones where a result has one, and symbolic zeros elsewhere."""
    zeros = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    return replaced(zeros, with_tangents(results), tangents)
