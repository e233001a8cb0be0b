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
    """H(p, q) = Σᵢ pᵢ log 1/qᵢ, in nats: the cross-entropy of a target p and a model q.

    H(p, q) = KL(p‖q) + H(p) ≥ H(p), with equality at q = p: over q it has the minimizer of the KL divergence. Not
    symmetric.

    Args:
      p: real, [..., n, ...], the target's probabilities of n classes along `axis`.
      q: real, [..., n, ...], the model's. Batch axes broadcast, the class axis doesn't.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcasts to the shape of p and q. A class where it is False takes no part, whatever it holds; a
        distribution with nothing left is 0, with gradient 0. So `where=mask[..., None]` drops rows.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or q is.

    At the boundary:
      pᵢ = 0 contributes 0, whatever number qᵢ is, and ∂H/∂qᵢ = 0. pᵢ > 0 = qᵢ makes H = +∞, with ∂H/∂qᵢ = -∞ and
      ∂H/∂pᵢ = +∞. A class of pᵢ = qᵢ = 0 is absent: 0 for both. An infinite derivative times a tangent or a cotangent
      that is exactly 0 is 0. n = 0 gives 0.

    Derivative:
      ∂H/∂qᵢ = -pᵢ/qᵢ, ∂H/∂pᵢ = log 1/qᵢ, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: the numbers of classes differ, the batch axes don't broadcast, there is no class axis, `axis` is not
        an int in range, or `where` doesn't broadcast.

    Not checked:
      pᵢ, qᵢ ≥ 0, Σ pᵢ = Σ qᵢ = 1 (see `check_distribution`). Subnormal numbers count as 0 where XLA flushes them, as it
      does on a CPU.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
      >>> print(jce.cross_entropy(p, q), jax.grad(jce.cross_entropy, 1)(p, q))
      1.0397208 [-2. -1. -0.]
    """
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
