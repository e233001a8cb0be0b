"""Every equation of a traced program, of those inside of others too, and of those that wait for their platform."""

from __future__ import annotations

import functools

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from jce._jax.waiting import PLATFORMS


def equations(jaxpr, platform: str | None = "cpu"):
    for equation in jaxpr.eqns:
        yield equation
        for j in inner(equation, platform):
            yield from equations(j, platform)


def inner(equation, platform):
    """The programs in an equation; of those by platform, the one that is lowered there, or without a platform all."""
    if equation.primitive.name == "waiting":
        names = PLATFORMS if platform is None else [platform if platform in PLATFORMS else None]
        return [opened(equation, name) for name in names]
    if platform and (by_platform := equation.params.get("branches_platforms")):
        branches = list(zip(equation.params["branches"], by_platform, strict=True))
        named = [branch for branch, platforms in branches if platform in (platforms or ())]
        (chosen,) = named or [branch for branch, platforms in branches if not platforms]  # the default
        return list(jaxprs(chosen))
    return [j for value in equation.params.values() for j in jaxprs(value)]


def opened(equation, platform):
    """What waits, as it is traced for a platform, without what its results don't need."""
    program = functools.partial(equation.params["program"], platform)
    with equation.params["settings"].again():
        jaxpr = jax.make_jaxpr(program)(*(v.aval for v in equation.invars)).jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def jaxprs(value):
    if isinstance(value, tuple | list):
        for x in value:
            yield from jaxprs(x)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from jaxprs(value.jaxpr)
