"""Every equation of a traced program, of nested programs, and of programs that are traced later, for a platform."""

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
    """The programs in an equation. If they differ by platform: the one for `platform`, or all if it is None."""
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
    """The program of an equation that waits for its platform, traced for this platform, without dead code."""
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
