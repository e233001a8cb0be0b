"""Makes a JAX primitive from a plain function, its derivative, and its transpose and batching rules if needed.

The rest is the same for all primitives: types come from tracing the function, an eager call is jitted, and in a program
the primitive is lowered to the function.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir
from jax.lax import mul_p

from jce._jax.jaxprs import results_of
from jce._jax.restricted import is_zero, linear_in, live_jvp, spread

try:  # Until JAX no longer hides how checkify is told what to check in a primitive (0.8 to 0.12): a private import.
    from jax._src import checkify
except ImportError:  # checkify then checks nothing in our primitives
    checkify = None

# Until JAX no longer imports Pallas with `jax.extend.core`, which exports this class.
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
    """A primitive that computes function(*arrays, *, static), which is an array, or a list of arrays if `several`.

    Args:
      function: the function, or a dict of one function per platform, with JAX's names as keys and None for all other
        platforms.
      derivative: JAX's JVP rule, (arguments, tangents) -> results and their tangents. Or one function per argument,
        (tangent, *arguments) -> its term of the result's tangent, with None if this term is 0.
      transpose: JAX's transpose rule, (cotangents, *arguments) -> cotangents. Or one function per argument in which the
        function is linear, (cotangent, *arguments) -> the argument's cotangent.
      batch: JAX's batching rule, (arguments, their axes) -> results and their axes. The default is the rule of an
        elementwise function: the same function of arrays with one more axis.
      types: (*types of the arguments) -> types of the results, if that is faster than tracing the function.
      holds_arrays: whether a static argument is a jaxpr. A jaxpr may hold arrays, so no cache of programs may keep it
        alive. The primitive has the effects of the jaxpr.
      checked: what checkify checks. By default, it looks for NaN in the results, but not inside: a NaN that the
        function computes and discards is not an error. False for no checks. Or a function (errors, *arrays, *, static)
        -> an Error of checkify, or a batch of them, with errors of these kinds, and the results.
    """
    p = Primitive(name)
    p.multiple_results = several
    # `one` has the signature and types that the functions of all platforms have. `alone` is what an eager call runs. If
    # platforms differ, it is the primitive itself, so that lowering picks the function of the platform.
    functions: dict = function if isinstance(function, dict) else {None: function}
    one = next(iter(functions.values()))
    alone = p.bind if len(functions) > 1 else one
    p.def_impl(_eager(alone, one, holds_arrays))
    # Under JAX_REMAT3 and similar flags, JAX 0.12 first rewrites the operations of a jaxpr, by this attribute of each
    # primitive. Without the attribute, JAX raises an error.
    p.to_lojax = alone
    p.def_effectful_abstract_eval(_types_and_effects(types or _traced_types(one, several), holds_arrays))
    if callable(derivative):
        ad.primitive_jvps[p] = derivative
    else:
        ad.defjvp(p, *derivative)
    ad.primitive_transposes[p] = transpose if callable(transpose) else functools.partial(_transposed_in_each, transpose)
    batching.primitive_batchers[p] = batch or functools.partial(_batched_elementwise, p)
    if checkify is not None and checked:
        nan_check = functools.partial(checkify.nan_error_check, p)
        checkify.error_checks[p] = functools.partial(_checked_inside, checked) if callable(checked) else nan_check
    for platform, of_platform in functions.items():
        mlir.register_lowering(p, mlir.lower_fun(of_platform, multiple_results=several), platform=platform)
    return p


# Rules that all primitives share


def _eager(alone: Callable, one: Callable, holds_arrays: bool) -> Callable:
    """The rule of an eager call: `alone` under a jit."""
    keywords = [key for key, x in inspect.signature(one).parameters.items() if x.kind is x.KEYWORD_ONLY]
    jitted = jax.jit(lambda *arrays, **static: alone(*arrays, **static), static_argnames=keywords)

    def run(*arrays, **static):
        if holds_arrays:
            return jax.jit(functools.partial(alone, **static))(*arrays)
        # Under jax.disable_jit, if `alone` binds the primitive, it would call `run` again, without end.
        with contextlib.nullcontext() if alone is one else jax.disable_jit(False):
            return jitted(*arrays, **static)

    return run


def _traced_types(one: Callable, several: bool) -> Callable:
    def types(*avals, **static):
        found = jax.make_jaxpr(functools.partial(one, **static))(*avals).out_avals
        return found if several else found[0]

    return types


def _types_and_effects(types: Callable, holds_arrays: bool) -> Callable:
    def rule(*avals, **static):
        effects = static["jaxpr"].effects if holds_arrays else ()
        # A mutable array that the function makes for itself has no effect outside of the function.
        return types(*avals, **static), {e for e in effects if type(e).__name__ != "InternalMutableArrayEffect"}

    return rule


def _transposed_in_each(rules: Sequence[Callable], cotangent, *arrays, **static) -> list:
    """The transpose rule of a primitive that has one rule per argument."""
    live = linear_in(arrays)
    if is_zero(cotangent):
        return spread(len(arrays), live, (ad.Zero(arrays[i].aval) for i in live))
    return spread(len(arrays), live, (rules[i](cotangent, *arrays, **static) for i in live))


def _batched_elementwise(p, arrays, axes, **static):
    return p.bind(*batch_axis_first(arrays, axes), **static), 0


def _checked_inside(checked: Callable, *arguments, **static):
    """checkify's rule for a primitive that reports errors itself."""
    assert checkify is not None
    at = next(i for i, x in enumerate(arguments) if isinstance(x, frozenset))
    # Until JAX 0.11: it passes no context before the error.
    (*context, error), errors, arrays = arguments[:at], arguments[at], arguments[at + 1 :]
    found, results = checked(errors, *arrays, **static)
    leaves, tree = jax.tree.flatten(found)
    check_error = checkify.check_error
    check = jax.make_jaxpr(lambda *leaves: check_error(tree.unflatten(leaves)))(*leaves)
    error, _ = checkify.checkify_jaxpr(*context, check, errors, error, *leaves)
    return error, results


# Functions as jaxprs


def evaluated_jaxpr(*arrays: Array, jaxpr, **_) -> list[Array]:
    return results_of(jaxpr.jaxpr, jaxpr.consts, arrays)


def derivative_inside(primals, tangents, *, jaxpr, **_):
    return live_jvp(functools.partial(evaluated_jaxpr, jaxpr=jaxpr), primals, tangents)


# Batches


def batch_axis_first(arrays: Sequence[Array], axes: Sequence[int | None]) -> list[Array]:
    """The arrays with the batch axis first. An array without a batch axis is broadcast."""
    size, pairs = batch_size(arrays, axes), zip(arrays, axes, strict=True)
    return [jnp.broadcast_to(x, (size, *x.shape)) if k is None else jnp.moveaxis(x, k, 0) for x, k in pairs]


def batch_size(arrays: Sequence[Array], axes: Sequence[int | None]) -> int:
    return next(x.shape[k] for x, k in zip(arrays, axes, strict=True) if k is not None)
