"""Checks of a function of tokens under checkify: each index, and each `checkify.check` that the function makes.

A loop over chunks maps the function by `jax.vmap` inside a `jax.checkpoint`, and JAX fails at checks in both.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jce._jax.waiting import Program, waiting

LOOKUPS = ("dynamic_slice", "gather")
UPDATES = ("dynamic_update_slice", "scatter", *(f"scatter-{name}" for name in ("add", "max", "min", "mul", "sub")))


def with_checks(jaxpr: Any) -> Any:
    """The jaxpr, with each operation that has a check in a form that checkify can check, or doesn't see."""
    return jaxpr.replace(eqns=[_with_checks(equation) for equation in jaxpr.eqns])


def _with_checks(equation: Any) -> Any:
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        inner = params["jaxpr"]
        return equation.replace(params=params | {"jaxpr": inner.replace(jaxpr=with_checks(inner.jaxpr))})
    if name not in ("check", *LOOKUPS, *UPDATES):
        return equation
    # Until JAX no longer raises an IndexError for a batch of updates under checkify: they are hidden.
    is_lookup = name in LOOKUPS and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.inexact)
    function = waiting if name in UPDATES else _looked_up if is_lookup else _anywhere
    program = Program(_bound, (equation.primitive, tuple(params.items())))
    # Until JAX no longer raises a ValueError where checkify adds a check to a jax.checkpoint, unless it is in a jit.
    (call,) = jax.make_jaxpr(jax.jit(functools.partial(function, program)))(*(v.aval for v in equation.invars)).eqns
    return call.replace(invars=equation.invars, outvars=equation.outvars)


def _bound(primitive, params, _, *arrays):
    return primitive.bind(*arrays, **dict(params))


def _anywhere(program, *arrays):
    return program(None, *arrays)


_looked_up = jax.custom_jvp(_anywhere, nondiff_argnums=(0,))


# Until JAX no longer raises an IndexError for the derivative of a batch of lookups under checkify: `waiting` hides the
# lookup of the tangent. The same indices are checked where the value is looked up.
@_looked_up.defjvp
def _looked_up_rule(program, primals, tangents):
    return _looked_up(program, *primals), waiting(program, tangents[0], *primals[1:])
