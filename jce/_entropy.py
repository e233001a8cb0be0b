"""H(p) = Σ pᵢ log 1/pᵢ."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._arguments import distributions, public
from jce._calculus import def_partials, negative, ratio


@public("axis")
def entropy(p: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """H(p) = Σᵢ pᵢ log 1/pᵢ, in nats: the entropy of discrete distributions.

    Between 0, at certainty, and log n, at the uniform distribution.

    Args:
      p: real, [..., n, ...], probabilities of n classes along `axis`.
      axis: the axis of the n classes: a static int.
      where: bool, broadcasts to the shape of p. A class where it is False takes no part, whatever it holds; a
        distribution with nothing left is 0, with gradient 0. So `where=mask[..., None]` drops rows.

    Returns:
      [..., ...], p without `axis`; float32, or float64 if p is.

    At the boundary:
      pᵢ = 0 contributes 0, and ∂H/∂pᵢ = +∞ there, the one-sided limit. An infinite derivative times a tangent or a
      cotangent that is exactly 0 is 0. n = 0 gives 0.

    Derivative:
      ∂H/∂pᵢ = log 1/pᵢ - 1, in p's dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: there is no class axis, `axis` is not an int in range, or `where` doesn't broadcast.

    Not checked:
      pᵢ ≥ 0 and Σ pᵢ = 1; a negative pᵢ gives a meaningless value (`check_distribution` finds it). Subnormal numbers
      count as 0 where XLA flushes them, as it does on a CPU.

    Source:
      C. E. Shannon, A Mathematical Theory of Communication (1948), section 6.

    Example:
      >>> float(jce.entropy([0.5, 0.25, 0.25]) / jnp.log(2))  # in bits
      1.5
    """
    (p,), axis = distributions("entropy", axis, where, p=p)
    return negative(_p_log_p(p).sum(axis))


@jax.custom_jvp
def _p_log_p(p):
    return p * _finite_log(p)


# d/dp p log p = log p + 1
def_partials(_p_log_p, lambda p: _log(p) + 1)


@jax.custom_jvp
def _log(p):
    # Not jnp.log(p), so that a program with value and gradient computes one logarithm.
    return jnp.where(p == 0, jnp.full_like(p, -jnp.inf), _finite_log(p))


# d log p/dp = 1/p
def_partials(_log, lambda p: ratio(jnp.ones_like(p), p))


def _finite_log(p):
    """log p for p > 0, and finite at 0, so that 0 log 0 = 0 without a select: inside a sum, a select would make XLA
    write the N × n terms to memory first, on a CPU."""
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
