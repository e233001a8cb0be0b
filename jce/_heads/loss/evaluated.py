"""Evaluates the trace of a head that is a function, or of a function that is mapped over tokens, in a loop over chunks.

It works like `jax.core.eval_jaxpr`, with three exceptions:

- Inside `jax.shard_map`, each argument of an operation is marked as varying over every mesh axis over which one of the
  arguments varies: in a loop, arrays vary over more axes than when the head was traced.
- Matmuls have no unit axes.
- An operation that checkify checks (a lookup, an update or a `checkify.check`) is put into a form that checkify can
  check, or that it doesn't see: JAX fails at checks in a `jax.vmap` and in a `jax.checkpoint`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._jax.jaxprs import results_of
from jce._jax.varying import vary_over, varying_alike
from jce._jax.waiting import Program, waiting

LOOKUPS = ("dynamic_slice", "gather")
UPDATES = ("dynamic_update_slice", "scatter", *(f"scatter-{name}" for name in ("add", "max", "min", "mul", "sub")))


def evaluated(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(variables):
        return [v.val if hasattr(v, "val") else values[v] for v in variables]  # a literal, or a variable

    for equation in jaxpr.eqns:
        values |= zip(equation.outvars, _results(jaxpr, equation, read(equation.invars)), strict=True)
    return read(jaxpr.outvars)


def _results(jaxpr: Any, equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """The results of one equation of a jaxpr."""
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        return evaluated(params["jaxpr"].jaxpr, params["jaxpr"].consts, arrays)
    if name in ("pvary", "pcast"):
        return vary_over(frozenset(params["axes"]), *arrays)
    if name == "dot_general":
        return [_dot_general(arrays, equation.outvars[0].aval.shape, **params)]
    if name in ("check", *LOOKUPS, *UPDATES):
        return _checkable(equation.primitive, params, *varying_alike(*arrays))
    known = {v: x for v, x in zip(equation.invars, arrays, strict=True) if not hasattr(v, "val")}
    alone = jaxpr.replace(constvars=[*known], invars=[], outvars=equation.outvars, eqns=[equation])
    return results_of(alone, varying_alike(*known.values()), [])


# Until JAX no longer copies both factors of a matmul that sums over several axes, on a CPU. A head is traced with the
# state of one token, [1, 1, d], so the gradient of its matmul would sum over the chunk's axis and both unit axes. For
# h @ kernel in float32, with 1,024 tokens, d = 512 and 32,768 classes, value and gradient would take 1.65 times the
# time on a CPU, and 1.5 times the temporary memory.
def _dot_general(factors: Sequence[Array], shape: tuple[int, ...], *, dimension_numbers: Any, **how: Any) -> Array:
    """`lax.dot_general` without the unit axes that are neither summed nor batched, with the result reshaped."""
    operands, places = [], []
    for x, *axes in zip(factors, *dimension_numbers, strict=True):
        kept = [i for i, n in enumerate(x.shape) if n != 1 or any(i in some for some in axes)]
        operands.append(x.reshape([x.shape[i] for i in kept]))
        places.append([tuple(map(kept.index, some)) for some in axes])
    summed, batch = zip(*places, strict=True)
    return lax.dot_general_p.bind(*varying_alike(*operands), dimension_numbers=(summed, batch), **how).reshape(shape)


def _checkable(primitive: Any, params: dict[str, Any], *arrays: Array) -> list[Array]:
    """The results of an operation, computed in a form that checkify can check or doesn't see."""
    is_lookup = primitive.name in LOOKUPS and jnp.issubdtype(arrays[0].dtype, jnp.inexact)
    # Until JAX no longer raises an IndexError for a batch of updates under checkify: hide updates from checkify.
    function = waiting if primitive.name in UPDATES else _looked_up if is_lookup else _anywhere
    program = Program(_bound, (primitive, tuple(params.items())))
    # Until JAX no longer raises a ValueError where checkify adds a check to a jax.checkpoint: a jit prevents it.
    return jax.tree.leaves(jax.jit(functools.partial(function, program))(*arrays))


def _bound(primitive, params, _, *arrays):
    return primitive.bind(*arrays, **dict(params))


def _anywhere(program, *arrays):
    return program(None, *arrays)


_looked_up = jax.custom_jvp(_anywhere, nondiff_argnums=(0,))


# Until JAX no longer raises an IndexError for the derivative of a batch of lookups under checkify: `waiting` hides the
# lookup in the tangent. The lookup of the value has the same indices, and there they are checked.
@_looked_up.defjvp
def _looked_up_rule(program, primals, tangents):
    return _looked_up(program, *primals), waiting(program, tangents[0], *primals[1:])
