"""Every equation of a traced program, of those inside of others too."""

from __future__ import annotations


def equations(jaxpr, platform: str | None = "cpu"):
    for equation in jaxpr.eqns:
        yield equation
        for j in inner(equation, platform):
            yield from equations(j, platform)


def inner(equation, platform):
    """The programs in an equation; of those by platform, the one that is lowered there, or without a platform all."""
    if platform and (by_platform := equation.params.get("branches_platforms")):
        branches = list(zip(equation.params["branches"], by_platform, strict=True))
        named = [branch for branch, platforms in branches if platform in (platforms or ())]
        (chosen,) = named or [branch for branch, platforms in branches if not platforms]  # the default
        return list(jaxprs(chosen))
    return [j for value in equation.params.values() for j in jaxprs(value)]


def jaxprs(value):
    if isinstance(value, tuple | list):
        for x in value:
            yield from jaxprs(x)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from jaxprs(value.jaxpr)
