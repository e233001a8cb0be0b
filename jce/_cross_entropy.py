"""H(p, q) = Σ pᵢ log 1/qᵢ."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._arguments import distributions, public
from jce._calculus import both_zero, def_partials, negative, ratio, reciprocal


@public("axis")
def cross_entropy(p: ArrayLike, q: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """TODO"""
    (p, q), axis = distributions("cross_entropy", axis, where, p=p, q=q)
    return negative(_p_log_q(p, q).sum(axis))


@jax.custom_jvp
def _p_log_q(p, q):
    return p * _log_q(p, q)


@jax.custom_jvp
def _log_q(p, q):
    # tiny - p is positive only at p = 0: there it keeps the logarithm finite, so that 0 log 0 = 0, and anywhere else
    # q stands as it is. A select would do the same, and make XLA write the N × n terms to memory on a CPU.
    return jnp.log(jnp.maximum(q, jnp.finfo(q.dtype).tiny - p))


# ∂/∂p p log q = log q, ∂/∂q p log q = p/q
def_partials(_p_log_q, lambda p, q: jnp.where(both_zero(p, q), jnp.zeros_like(q), _log_q(p, q)), ratio)
# ∂/∂q log q = 1/q
def_partials(_log_q, lambda p, q: jnp.zeros_like(p), reciprocal)
