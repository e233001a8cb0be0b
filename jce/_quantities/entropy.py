"""H(p) = Σ pᵢ log 1/pᵢ."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.public import public
from jce._jax.rows import distributions
from jce._numerics.calculus import custom_jvp, def_at_once, def_partials_of_sum, def_tangents, negative
from jce._numerics.elementary import log, log1p
from jce._numerics.mul0 import mul0, multiply, over
from jce._softmax.kernel import kernel
from jce._softmax.softmax import centered, softmax, unless_nan


@public("axis")
def entropy(p: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """The entropy of discrete distributions, in nats.

    H(p) = Σᵢ pᵢ log 1/pᵢ

    Example:
      >>> float(jce.entropy([0.5, 0.25, 0.25]) / jnp.log(2))  # in bits
      1.5

    The entropy lies between 0, if one class is certain, and log n, for the uniform distribution.

    Args:
      p: real, [..., n, ...], probabilities of n classes along `axis`.
      axis: the axis of the n classes: a static int.
      where: bool, broadcast to p. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.

    Returns:
      [..., ...], p without `axis`; float32, or float64 if p is.

    At the boundary:
      A class with pᵢ = 0 contributes 0, with ∂H/∂pᵢ = +∞, the one-sided limit.

    Derivative:
      ∂H/∂pᵢ = log 1/pᵢ - 1, in p's dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit.

    Not checked:
      Σ pᵢ = 1 (see `check_distribution`). A negative pᵢ gives NaN, as its logarithm does.

    Source:
      C. E. Shannon, A Mathematical Theory of Communication (1948), section 6.

    See "Arguments", "Excluded classes" and "Conventions" in jce/README.md.
    """
    (p,), classes = distributions("entropy", axis, where, p=p)
    return negative(_sum_p_log_p(p, classes))


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sum_p_log_p(p, classes):
    # |p| equals p wherever log p isn't NaN. For few classes |p| is faster, because a CPU is slow at combining an input
    # itself with a number computed from it (`passes.py`).
    few = classes.are_few(p)
    return classes.sum((jnp.abs(p) if few else p) * log(_above_0(p, few)))


def _above_0(p, few):
    """p, but the smallest normal number, `tiny`, where p = 0, so that p log p is 0 there. A negative p stays negative,
    so its logarithm is NaN."""
    # For p ≥ 0 the maximum with tiny does this. For p < 0 a second term makes the result negative: -2|p| for few
    # classes, otherwise 2³⁰p. Each is the faster choice on a CPU.
    tiny = jnp.finfo(p.dtype).tiny
    if few:
        return jnp.maximum(p, tiny) + (p - jnp.abs(p))
    return jnp.minimum(jnp.maximum(p, tiny), 2.0**30 * p + tiny)


# d/dp p log p = log p + 1
def_partials_of_sum(_sum_p_log_p, lambda p, _: _log(p) + 1)


@custom_jvp
def _log(p):
    return log(p)


# d log p/dp = 1/p
def_tangents(_log, over)


@public("axis", "axis_name")
def entropy_with_logits(
    logits: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The entropy of discrete distributions given by logits, in nats.

    H(q) = Σᵢ qᵢ log 1/qᵢ with q = softmax(logits)

    Example:
      >>> print(jce.entropy_with_logits(jnp.array([[0.0, 0.0], [20.0, 0.0]])))
      [6.9314718e-01 4.3284228e-08]

    The entropy lies between 0, if one class is certain, and log n, if all logits are equal. Its relative error is small
    even if one class has nearly all of the probability.

    Args:
      logits: real, [..., n, ...], logits (or log-probabilities) of n classes along `axis`.
      axis: the axis of the n classes: a static int.
      where: bool, broadcast to logits. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      [..., ...], logits without `axis`; float32, or float64 if logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0: it contributes 0, with derivative 0. A row with a NaN, a +∞ or only -∞
      is NaN.

    Derivative:
      ∂H/∂xᵢ = qᵢ (log 1/qᵢ - H), in logits' dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit.

    Not checked:
      That logits hold no NaN or +∞, which make their row NaN.

    See "Arguments", "Excluded classes", "Conventions" and "Classes split over devices" in jce/README.md.
    """
    (x,), classes = distributions("entropy_with_logits", axis, where, axis_name, in_logits=("logits",), logits=logits)
    return entropy_of_softmax(x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def entropy_of_softmax(x, backend):
    # Σ qᵢ log 1/qᵢ = log Z + Σ eᵢ (m - xᵢ) / Z: no term is negative, so nothing cancels.
    _, s, t = backend.sums(x)
    return log1p(s) + t / (1 + s)


# ∂H/∂xᵢ = qᵢ (log 1/qᵢ - H)
@entropy_of_softmax.defjvp
def _entropy_of_softmax_rule(classes, primals, tangents):
    h, excess = _entropy_and_weighted_excess(*primals, classes)
    return h, classes.sum(mul0(excess, tangents[0]))


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def _weighted_excess(x, backend):
    return mul0(_surprisal_excess(x, backend), softmax(x, backend))


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def _surprisal_excess(x, backend):
    """log 1/qᵢ - H, computed as (m - xᵢ) - Σ q (m - x): near the uniform distribution log 1/qᵢ and H are both near
    log n, and subtracting them would lose all digits."""
    n, t = backend.exponentials(x).of_row, backend.sums(x).t
    # m - xᵢ is clipped at 10⁴, where q has long underflowed to 0. In derivatives of every order this finite number
    # times 0 is 0, while +∞ times 0 would be NaN.
    return jnp.minimum(-backend.depth(x, n), 1e4) - backend.column(t / n.z)


# d (log 1/qᵢ - H) = -(tᵢ - Σ q t) - dH
@_surprisal_excess.defjvp
def _surprisal_excess_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    dh = classes.sum(mul0(_weighted_excess(x, classes), t))
    return _surprisal_excess(x, classes), -centered(t, x, classes) - classes.broadcast(dh, t)


# d qᵢ (log 1/qᵢ - H) = qᵢ ((tᵢ - Σ q t)(log 1/qᵢ - H - 1) - dH), with dH = Σ qᵢ (log 1/qᵢ - H) tᵢ
@_weighted_excess.defjvp
def _weighted_excess_rule(classes, primals, tangents):
    return _weighted_excess(*primals, classes), _tangent_of_weighted_excess(*tangents, *primals, classes)


# One kernel computes both: with two kernels, a GPU would read x once more.
@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def _entropy_and_weighted_excess(x, backend):
    return entropy_of_softmax(x, backend), _weighted_excess(x, backend)


def_at_once(_entropy_and_weighted_excess, entropy_of_softmax, _weighted_excess)


@kernel
def _tangent_of_weighted_excess(t, x, backend):
    _, z, u, _, covariance = backend.deviation(t, x)
    excess = _surprisal_excess(x, backend)
    centered = multiply(excess - 1, u)
    tangent = mul0(softmax(x, backend), centered - backend.column(covariance(excess)))
    return unless_nan(z, tangent, t, backend)
