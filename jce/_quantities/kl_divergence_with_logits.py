"""KL(p‖q) at p = softmax(x) and q = softmax(y), accurate even if p ≈ q."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jce._jax.arguments import positive
from jce._jax.public import public
from jce._jax.rows import distributions
from jce._numerics.calculus import custom_jvp, def_at_once, sum_of_tangents
from jce._numerics.deviance import deviance_from_log, difference_from_log
from jce._numerics.mul0 import mul0
from jce._softmax.compare import (
    at_common_temperature,
    compare,
    deviances,
    log_q_over_p,
    one_at_a_time,
    q_minus_p,
)
from jce._softmax.kernel import kernel, storing_kernel
from jce._softmax.softmax import centered, softmax


@public("axis", "axis_name", numbers=("temperature",))
def kl_divergence_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The Kullback-Leibler divergence of two distributions given by logits, in nats.

    KL(p‖q) = Σᵢ pᵢ log pᵢ/qᵢ with p = softmax(p_logits) and q = softmax(q_logits)

    Example:
      >>> print(jce.kl_divergence_with_logits(jnp.array([50.0, 0.0]), jnp.array([60.0, 0.0])))
      1.7358838e-21

    Rounding never makes it negative, and its relative error is small even if p ≈ q. It is not symmetric.

    Args:
      p_logits: real, [..., n, ...], the target's logits (or log-probabilities) of n classes along `axis`.
      q_logits: real, [..., n, ...], the model's logits. Batch axes broadcast, the class axis doesn't.
      temperature: T > 0, a number by which both rows of logits are divided. The result isn't multiplied by T². The
        division by T is done after the subtraction of the two rows, so nearly equal rows are compared as accurately as
        at T = 1. If you divide the logits yourself, each is rounded, and that accuracy is lost.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to both. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p_logits or q_logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0. If it is in p_logits, the class contributes 0, with ∂KL/∂p_logits = 0.
      If it is in q_logits only, KL = +∞. Then ∂KL/∂p_logits is +∞ at this class and -∞ at the other classes with p > 0.
      ∂KL/∂q_logits is then q - p as usual, and the derivative with respect to a traced temperature is NaN. A row with a
      NaN, a +∞ or only -∞ is NaN.

    Derivative:
      ∂KL/∂p_logitsᵢ = pᵢ (log pᵢ/qᵢ - KL), ∂KL/∂q_logitsᵢ = qᵢ - pᵢ, each in its argument's dtype. At a temperature T
      both are divided by T, and a traced T has a derivative too.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit, or temperature isn't above 0.

    Not checked:
      Logits ≤ 4e37 in float32 (an eighth of the largest float). Larger ones overflow.

    See "Arguments", "Excluded classes", "Conventions" and "Classes split over devices" in jce/README.md.
    """
    names = ("p_logits", "q_logits")
    (x, y), classes = distributions(
        "kl_divergence_with_logits", axis, where, axis_name, in_logits=names, p_logits=p_logits, q_logits=q_logits
    )
    t = positive("kl_divergence_with_logits", x.dtype, temperature=temperature)
    return kl_of_softmax(*at_common_temperature(x, y, t, classes), classes)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def kl_of_softmax(x, y, d, backend):
    """KL(p‖q) for p = softmax(x) and q = softmax(y). d is y - x, computed more accurately than from x and y
    (`compare.py`), or None."""
    return backend.sum(deviance_from_log(*compare(x, y, d, backend)))


# ∂KL/∂xᵢ = pᵢ (log pᵢ/qᵢ - KL), ∂KL/∂yᵢ = qᵢ - pᵢ
def _kl_rule(classes, primals, tangents):
    if not one_at_a_time(tangents):
        return kl_of_softmax(*primals, classes), classes.sum(_along_both(primals, tangents, classes))
    if isinstance(tangents[0], SymbolicZero):  # a derivative along y alone stores no N × n array
        return kl_of_softmax(*primals, classes), classes.sum(mul0(q_minus_p(*primals, classes), tangents[1]))
    kl, in_x, in_y = _kl_and_partials(*primals, classes)
    return kl, classes.sum(sum_of_tangents(tangents[:2], lambda t: mul0(in_x, t), lambda t: mul0(in_y, t)))


kl_of_softmax.defjvp(_kl_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@storing_kernel
def _kl_and_partials(x, y, d, backend):
    # One kernel computes all three results, since each of them compares x and y.
    p, q, delta = compare(x, y, d, backend, stored=True)
    kl = backend.sum(deviance_from_log(p, q, delta))
    return kl, _weighted_excess_of(p, -delta, kl, x, backend), difference_from_log(p, q, delta)


# (qᵢ - pᵢ - pᵢδᵢ - pᵢ KL) dxᵢ + (qᵢ - pᵢ) ddᵢ. In ∂KL/∂xᵢ dxᵢ + ∂KL/∂yᵢ dyᵢ, terms of first order in δ would cancel.
def _along_both(primals, tangents, classes):
    (x, y, d), (dx, dy, dd) = primals, tangents
    rows = x, y, d, classes
    in_x, in_y, kl = _weighted_excess(*rows), q_minus_p(*rows), classes.column(kl_of_softmax(*rows))
    in_both = deviances(*rows) - mul0(jnp.broadcast_to(kl, x.shape), softmax(x, classes))
    # Where q is far above p, `in_both` is mere rounding of q, and ∂KL/∂x would lose all digits. There `in_x` is used.
    near = jnp.abs(lax.stop_gradient(log_q_over_p(*rows))) < 1.5
    return mul0(jnp.where(near, in_both, in_x), dx) + jnp.where(near, mul0(in_y, dd), mul0(in_y, dy))


def _weighted_excess(x, y, d, backend):
    """pᵢ (log pᵢ/qᵢ - KL)"""
    kl, log_p_q = kl_of_softmax(x, y, d, backend), -log_q_over_p(x, y, d, backend)
    return _weighted_excess_of(softmax(x, backend), log_p_q, kl, x, backend)


def _weighted_excess_of(p, log_p_q, kl, x, backend):
    impossible = log_p_q == jnp.inf
    infinite = backend.column(kl) == jnp.inf
    # Without the scaling, sums over n classes with weights up to 2¹² (FINE of `passes.py`) might overflow.
    scale = 2.0 ** -(backend.count(x).bit_length() + 12)
    excess = centered(jnp.where(impossible | (p == 0), jnp.zeros_like(p), scale * log_p_q), x, backend) / scale
    excess = jnp.where(infinite, jnp.where(impossible, jnp.inf, -jnp.inf).astype(p.dtype), excess)
    return mul0(excess, p)


def_at_once(_kl_and_partials, kl_of_softmax, _weighted_excess, q_minus_p)
