"""Functions restricted to some of their arguments: those that are differentiated, or in which they are linear.

The rules of primitives are built from these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad


def replaced(xs: Iterable, indices: Iterable[int], values: Iterable) -> list:
    """xs, with values at these indices."""
    xs = list(xs)
    for i, x in zip(indices, values, strict=True):
        xs[i] = x
    return xs


def spread(count: int, indices: Iterable[int], values: Iterable) -> list:
    """A list of this length with values at these indices, and None elsewhere."""
    return replaced([None] * count, indices, values)


def of_some(function: Callable, arguments: Sequence, indices: Sequence[int]) -> Callable:
    """The function of the arguments at these indices alone; the others have the given values."""
    return lambda *values: function(*replaced(arguments, indices, values))


def jvp_of_some(function: Callable, primals: Sequence, indices: Sequence[int], tangents: Sequence):
    """`jax.jvp` in the primals at these indices, along their tangents."""
    return jax.jvp(of_some(function, primals, indices), [primals[i] for i in indices], list(tangents))


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


def cotangent(function: Callable, live: Sequence[int], types: Sequence, nonzero: Sequence[int], *arrays: Array):
    """The cotangents of the `live` arguments, in which the function is linear and which have these types. `arrays` are
    the cotangents of the results at the indices `nonzero`, then the other arguments."""
    cotangents, known = list(arrays[: len(nonzero)]), arrays[len(nonzero) :]
    count = len(known) + len(live)
    arguments = spread(count, all_but(count, live), known)

    def results(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return [leaves[i] for i in nonzero]

    return jax.linear_transpose(of_some(results, arguments, live), *types)(cotangents)


def all_but(count: int, indices: Sequence[int]) -> list[int]:
    """Of `count` indices those that aren't among these."""
    return [i for i in range(count) if i not in indices]


def with_tangents(xs: Sequence) -> list[int]:
    """The indices of arrays, or types of arrays, that have a tangent: the inexact ones."""
    return [i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.inexact)]


def linear_in(arrays: Sequence) -> tuple[int, ...]:
    """The indices of the arguments in which a function is to be transposed."""
    return tuple(i for i, x in enumerate(arrays) if ad.is_undefined_primal(x))


def not_zero(tangents: Sequence) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not is_zero(t))


def is_zero(t) -> bool:
    return isinstance(t, (ad.Zero, SymbolicZero))


def with_zeros(results: Sequence[Array], tangents: Iterable) -> list:
    """The tangents of all results: the given ones where a result has one, and symbolic zeros elsewhere."""
    zeros = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    return replaced(zeros, with_tangents(results), tangents)
