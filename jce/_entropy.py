"""H(p) = Σ pᵢ log 1/pᵢ."""

from __future__ import annotations

import jax
from jax import Array
from jax.typing import ArrayLike

from jce._arguments import distributions, public
from jce._calculus import def_partials, finite_log, log, negative


@public("axis")
def entropy(p: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """TODO"""
    (p,), axis = distributions("entropy", axis, where, p=p)
    return negative(_p_log_p(p).sum(axis))


@jax.custom_jvp
def _p_log_p(p):
    return p * finite_log(p)


# d/dp p log p = log p + 1
def_partials(_p_log_p, lambda p: log(p) + 1)
