"""Restricts functions to some of their arguments: those that are differentiated, or those in which they are linear.

The rules of primitives are built from these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad


def replaced(xs: Iterable, indices: Iterable[int], values: Iterable) -> list:
    """A list of xs, with these values at these indices."""
    xs = list(xs)
    for i, x in zip(indices, values, strict=True):
        xs[i] = x
    return xs


def spread(count: int, indices: Iterable[int], values: Iterable) -> list:
    """A list of length `count`, with these values at these indices, and None elsewhere."""
    return replaced([None] * count, indices, values)


def of_some(function: Callable, arguments: Sequence, indices: Sequence[int]) -> Callable:
    """The function of only the arguments at these indices. The others keep the given values."""
    return lambda *values: function(*replaced(arguments, indices, values))


def jvp_of_some(function: Callable, primals: Sequence, indices: Sequence[int], tangents: Sequence):
    """`jax.jvp` with respect to the primals at these indices, along these tangents."""
    return jax.jvp(of_some(function, primals, indices), [primals[i] for i in indices], list(tangents))


def live_jvp(function: Callable, primals, tangents):
    """`jax.jvp` with respect to the arguments whose tangents aren't symbolic zeros."""
    leaves, tree = jax.tree.flatten(primals)
    tangents = jax.tree.leaves(tangents, is_leaf=is_zero)
    live = not_zero(tangents)
    return jvp_of_some(lambda *leaves: function(*tree.unflatten(leaves)), leaves, live, [tangents[i] for i in live])


def tangent(function: Callable, live: Sequence[int], *arrays: Array) -> list[Array]:
    """The tangents of the results that have a tangent. `arrays` are all arguments, then the tangents of the `live`
    ones."""
    primals, tangents = arrays[: -len(live)], arrays[-len(live) :]

    def results(*primals):
        leaves = jax.tree.leaves(function(*primals))
        return [leaves[i] for i in with_tangents(leaves)]

    return jvp_of_some(results, primals, live, tangents)[1]


def cotangent(function: Callable, live: Sequence[int], types: Sequence, nonzero: Sequence[int], *arrays: Array):
    """The cotangents of the `live` arguments, which have these types and in which the function is linear. `arrays` are
    the cotangents of the results at the indices `nonzero`, then the other arguments."""
    cotangents, known = list(arrays[: len(nonzero)]), arrays[len(nonzero) :]
    count = len(known) + len(live)
    arguments = spread(count, all_but(count, live), known)

    def results(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return [leaves[i] for i in nonzero]

    return jax.linear_transpose(of_some(results, arguments, live), *types)(cotangents)


def all_but(count: int, indices: Sequence[int]) -> list[int]:
    """The indices below `count` that aren't among these."""
    return [i for i in range(count) if i not in indices]


def with_tangents(xs: Sequence) -> list[int]:
    """The indices of arrays, or types of arrays, that have a tangent: the inexact ones."""
    return [i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.inexact)]


def linear_in(arrays: Sequence) -> tuple[int, ...]:
    """In a transpose rule, the indices of the arguments with respect to which JAX transposes the function."""
    return tuple(i for i, x in enumerate(arrays) if ad.is_undefined_primal(x))


def not_zero(tangents: Sequence) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not is_zero(t))


def is_zero(t) -> bool:
    return isinstance(t, (ad.Zero, SymbolicZero))


def with_zeros(results: Sequence[Array], tangents: Iterable) -> list:
    """The tangents of all results. Inexact results get the given tangents, the others symbolic zeros."""
    zeros = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    return replaced(zeros, with_tangents(results), tangents)
