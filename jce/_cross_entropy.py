"""H(p, q) = Σ pᵢ log 1/qᵢ."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jce._arguments import distributions, fraction, is_array, labelled, public
from jce._calculus import (
    both_zero,
    custom_jvp,
    def_partials_of_sum,
    def_tangents,
    negative,
    over_if_present,
    ratio,
)
from jce._elementary import exp, log
from jce._mul0 import mul0
from jce._platforms import Way, per_platform, per_platform_apart
from jce._softmax import (
    another,
    complement,
    normalizer,
    off_label_sum,
    softmax,
    softmax_tangent,
    surprisal,
    surprisal_at_label,
)


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
      Σ pᵢ = Σ qᵢ = 1 (see `check_distribution`). In pᵢ the formula is linear, also below 0; a negative qᵢ is NaN, as
      its logarithm is. Subnormal numbers count as 0 where XLA flushes them, as it does on a CPU.

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
      >>> print(jce.cross_entropy(p, q), jax.grad(jce.cross_entropy, 1)(p, q))
      1.0397208 [-2. -1. -0.]
    """
    (p, q), classes = distributions("cross_entropy", axis, where, p=p, q=q)
    return negative(_sum_p_log_q(p, q, classes))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def _sum_p_log_q(p, q, classes):
    return classes.sum(p * jnp.maximum(log(q), bound(p, -1, classes)))


def bound(p, sign, classes):
    """A number at p = 0, and ±∞ at any normal p: what is within that may be multiplied with p, and 0 · ∞ is 0. A select
    would make XLA write the N × n factors of a sum to memory on a CPU."""
    info = jnp.finfo(p.dtype)
    if classes.are_few(p):
        return sign * jnp.abs((p * info.max) * classes.lowest(p))
    return sign * info.max * (0.5 + jnp.abs(p) * (1.5 / info.tiny))


@custom_jvp
def _log_q(p, q):
    return log(q) + (p - p)  # NaN where p is


# ∂/∂p p log q = log q, ∂/∂q p log q = p/q
def_partials_of_sum(
    _sum_p_log_q,
    lambda p, q, _: jnp.where(both_zero(p, q), jnp.zeros_like(q), _log_q(p, q)),
    lambda p, q, _: ratio(p, q),
)
# ∂/∂q log q = 1/q
def_tangents(_log_q, lambda t, p, q: jnp.zeros_like(t), over_if_present)


@public("axis", "axis_name")
def cross_entropy_with_logits(
    p: ArrayLike,
    logits: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """H(p, q) = Σᵢ pᵢ log 1/qᵢ at q = softmax(logits), in nats: the cross-entropy of a target p and logits.

    Relatively accurate where the model is sure and right: a loss of 1e-30 is 1e-30. Minimal over q at q = p.

    Args:
      p: real, [..., n, ...], the target's probabilities of n classes along `axis`.
      logits: real, [..., n, ...], the model's logits (or log-probabilities). Batch axes broadcast, the class axis
        doesn't.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcasts to the shape of p and logits. A class where it is False takes no part, whatever it holds;
        a distribution with nothing left is 0, with gradient 0. So `where=mask[..., None]` drops rows.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the classes are split; the result
        is the same on all its devices. None where each device has all classes. Under `check_vma=False` differentiate
        outside of the `shard_map`: inside, a gradient is wrong without an error, as plain JAX's of a `psum` is.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0: where pᵢ = 0 it contributes 0, with derivative 0; where pᵢ > 0 it makes
      H = +∞. ∂H/∂pᵢ = +∞ there. A NaN, a +∞ or nothing but -∞ among the logits makes its row NaN. n = 0 gives 0.

    Derivative:
      ∂H/∂xᵢ = qᵢ Σp - pᵢ, ∂H/∂pᵢ = log 1/qᵢ, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: the numbers of classes differ, the batch axes don't broadcast, there is no class axis, `axis` is not
        an int in range, or `where` doesn't broadcast.

    Not checked:
      pᵢ ≥ 0 and Σ pᵢ = 1 (see `check_distribution`): the formula is linear in p, also below 0. Results below the
      smallest normal number are 0 where XLA flushes them, as it does on a CPU.

    Example:
      >>> p, logits = jnp.array([1.0, 0.0, 0.0]), jnp.array([20.0, 0.0, 0.0])
      >>> print(jce.cross_entropy_with_logits(p, logits), jax.grad(jce.cross_entropy_with_logits, 1)(p, logits))
      4.1223074e-09 [-4.1223074e-09  2.0611537e-09  2.0611537e-09]
    """
    (p, x), classes = distributions(
        "cross_entropy_with_logits", axis, where, axis_name, in_logits=("logits",), p=p, logits=logits
    )
    return _soft(p, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform
def _soft(p, x, classes):
    loss = classes.sum(p * jnp.minimum(normalizer(x, classes).surprisal(x, classes), bound(p, 1, classes)))
    # Or XLA makes one sum of a row's and a batch's, which is no chain.
    return lax.optimization_barrier(loss) if classes.way is Way.CHAIN else loss


# ∂H/∂pᵢ = log 1/qᵢ, ∂H/∂xᵢ = qᵢ Σp - pᵢ
def_partials_of_sum(_soft, lambda p, x, classes: surprisal(x, classes), lambda p, x, classes: _excess(p, x, classes))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform_apart
def _excess(p, x, classes):
    n = normalizer(x, classes)
    total = classes.sum(p)
    d = x - classes.column(another(n.m, n.s, few=classes.masks))
    # Of a class that dominates q = 1 - s/Z, and Σp - p is exact.
    dominant = (classes.column(total) - p) - classes.column(total * (n.s / n.z))
    return jnp.where(d > classes.column(n.shared - 0.5), dominant, exp(d) * classes.column(total / n.z) - p)


def _excess_rule(classes, primals, tangents):
    (p, x), (dp, dx) = primals, tangents
    terms = []
    if not isinstance(dp, SymbolicZero):
        q = softmax(x, classes)
        d_total = classes.each(classes.sum(dp), p)
        # For a class of q > 1/2, q Σdp - dp is the sum of the other dp, less (1 - q) Σdp.
        others = classes.column(classes.sum(jnp.where(q > 0.5, jnp.zeros_like(dp), dp)))
        terms.append(jnp.where(q > 0.5, others - mul0(complement(x, classes), d_total), mul0(q, d_total) - dp))
    if not isinstance(dx, SymbolicZero):
        terms.append(softmax_tangent(dx, x, classes.sum(p), classes))
    return _excess(p, x, classes), functools.reduce(jnp.add, terms)


_excess.defjvp(_excess_rule, symbolic_zeros=True)


@public("axis", "axis_name", numbers=("label_smoothing",))
def cross_entropy_with_integer_labels(
    labels: ArrayLike,
    logits: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """log 1/q_y at q = softmax(logits), in nats: the cross-entropy of one-hot targets, given as labels y, and logits.

    With label_smoothing ε the target is (1-ε) one-hot + ε/n over all n classes, the label's included: the loss is
    (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ. No one-hot array is built. Relatively accurate where the model is sure and right:
    a loss of 1e-30 is 1e-30, and its gradient points the right way.

    Args:
      labels: integer, [..., ...], class indices: exactly the shape of logits without `axis`.
      logits: real, [..., n, ...], the model's logits (or log-probabilities) of n classes along `axis`.
      label_smoothing: ε, a number from 0 to 1. One that is traced, as of a schedule, isn't checked.
      axis: the axis of the n classes: a static int.
      where: bool, broadcasts to the shape of logits. A class where it is False has probability 0, whatever it holds,
        and n counts the others; a distribution with nothing left is 0, with gradient 0, whatever its label. So
        `where=mask[..., None]` drops rows.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the classes are split; the result
        is the same on all its devices. None where each device has all classes. Under `check_vma=False` differentiate
        outside of the `shard_map`: inside, a gradient is wrong without an error, as plain JAX's of a `psum` is.

    Returns:
      [..., ...], the shape of labels; float32, or float64 if logits is.

    At the boundary:
      A label outside [0, n) makes its own row NaN, in value and gradient; it never counts from the end. A logit of -∞
      is a class of probability 0, with derivative 0; at the label, or with label smoothing, it makes the loss +∞. A
      NaN, a +∞ or nothing but -∞ makes a row NaN. n = 0 gives 0. A traced ε of 0 is none: a logit of -∞ costs nothing.

    Derivative:
      ∂/∂xᵢ = qᵢ - (1-ε) [i = y] - ε/n, in logits' dtype; at ε = 0 relatively accurate for every i. In a traced ε it is
      1/n Σᵢ log 1/qᵢ - log 1/q_y.

    Raises:
      TypeError: labels are not integers, logits not real, or `where` not boolean.
      ValueError: labels don't have the shape of logits without the class axis, label_smoothing is not in [0, 1], there
        is no class axis, `axis` is not an int in range, or `where` doesn't broadcast.

    Not checked:
      Values. Results below the smallest normal number are 0 where XLA flushes them, as it does on a CPU.

    Example:
      >>> logits = jnp.array([[20.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
      >>> print(jce.cross_entropy_with_integer_labels(jnp.array([0, 1]), logits))
      [4.1223074e-09 1.4076060e+00]
    """
    y, x, kept, classes = labelled("cross_entropy_with_integer_labels", axis, where, axis_name, labels, logits)
    smoothing = fraction("cross_entropy_with_integer_labels", x.dtype, label_smoothing=label_smoothing)
    loss = label_surprisal(y, x, classes)
    if not is_array(smoothing) and smoothing == 0:
        return loss
    uniform = kept / jnp.maximum(classes.column(classes.sum(kept)), 1)
    return smoothed(loss, _soft(uniform, x, classes), smoothing)


def smoothed(loss, uniform_loss, smoothing):
    if is_array(smoothing):
        both = scaled(1 - smoothing, loss) + scaled(smoothing, uniform_loss)
        return jnp.where(jnp.isnan(loss), loss, both)  # also at ε = 1
    if smoothing == 1:  # the label counts for nothing, even where its loss is +∞, but it still must be one
        return jnp.where(jnp.isnan(loss), loss, uniform_loss)
    return (1 - smoothing) * loss + smoothing * uniform_loss


def scaled(number, x):
    """The number times x, and 0 for a traced 0, whatever x is; Python's 0 costs nothing at all, so isn't asked here."""
    return mul0(x, number * jnp.ones_like(x)) if is_array(number) else number * x


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def label_surprisal(y, x, classes):
    """log 1/q_y"""
    return _label_surprisal_and_excess(y, x, classes)[0]


# ∂/∂xᵢ log 1/q_y = qᵢ - [i = y]
@label_surprisal.defjvp
def _label_surprisal_rule(classes, primals, tangents):
    surprisal, excess = _label_surprisal_and_excess(*primals, classes)
    return surprisal, classes.sum(mul0(excess, tangents[1]))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform
def _label_surprisal_and_excess(y, x, classes):
    # Both in one function, since XLA can't see that two off-label sums, behind their barriers, are the same.
    m, s, d = off_label_sum(y, x, classes)
    # The excess is written over e, but where rows are folded: there each pass computes its own.
    e = exp(x - classes.column(m if classes.blocks == 1 else another(m, s)))
    excess = jnp.where(classes.is_at(x, classes.local(y, x)), classes.column(-s), e) / classes.column(s + exp(-d))
    return surprisal_at_label(d, s), excess


@_label_surprisal_and_excess.defjvp
def _label_surprisal_and_excess_rule(classes, primals, tangents):
    x, t = primals[1], tangents[1]
    surprisal, excess = _label_surprisal_and_excess(*primals, classes)
    return (surprisal, excess), (classes.sum(mul0(excess, t)), softmax_tangent(t, x, None, classes))
