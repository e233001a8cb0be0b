"""H(p, q) = Σ pᵢ log 1/qᵢ."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import fraction, positive
from jce._jax.labels import labelled, labelled_with_probs, require_no_tail
from jce._jax.public import public
from jce._jax.rows import distributions
from jce._numerics.calculus import (
    both_zero,
    custom_jvp,
    def_partials_of_sum,
    def_tangents,
    negative,
    over_if_present,
    ratio,
)
from jce._numerics.elementary import log
from jce._quantities.label_loss import label_loss, or_none
from jce._quantities.soft_targets import soft
from jce._quantities.sparse_targets import rounding, sparse_cross_entropy
from jce._quantities.z_loss import log_sum_penalty


@public("axis")
def cross_entropy(p: ArrayLike, q: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """The cross-entropy of a target p and a model q, in nats.

    H(p, q) = Σᵢ pᵢ log 1/qᵢ

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
      >>> print(jce.cross_entropy(p, q), jax.grad(jce.cross_entropy, 1)(p, q))
      1.0397208 [-2. -1. -0.]

    H(p, q) = KL(p‖q) + H(p) ≥ H(p), with equality at q = p. It is not symmetric.

    Args:
      p: real, [..., n, ...], the target's probabilities of n classes along `axis`.
      q: real, [..., n, ...], the model's probabilities. Batch axes broadcast, the class axis doesn't.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to p and q. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or q is.

    At the boundary:
      A class with pᵢ = 0 contributes 0 for every finite qᵢ ≥ 0, with ∂H/∂qᵢ = 0. A class with pᵢ > 0 = qᵢ makes
      H = +∞, with ∂H/∂qᵢ = -∞ and ∂H/∂pᵢ = +∞. A class with pᵢ = qᵢ = 0 is absent: both derivatives are 0.

    Derivative:
      ∂H/∂qᵢ = -pᵢ/qᵢ, ∂H/∂pᵢ = log 1/qᵢ, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit.

    Not checked:
      Σ pᵢ = Σ qᵢ = 1 (see `check_distribution`). The formula is linear in pᵢ, and is evaluated as written even for
      negative pᵢ. A negative qᵢ gives NaN, from its logarithm.

    See "Arguments", "Excluded classes" and "Conventions" in jce/README.md.
    """
    (p, q), classes = distributions("cross_entropy", axis, where, p=p, q=q)
    return negative(_sum_p_log_q(p, q, classes))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def _sum_p_log_q(p, q, classes):
    return classes.sum(p * log(classes.above_0(q, p)))


@custom_jvp
def _log_q(p, q):
    return log(q) + (p - p)  # log q doesn't depend on p, but must be NaN where p is


# ∂/∂p p log q = log q, ∂/∂q p log q = p/q
def_partials_of_sum(
    _sum_p_log_q,
    lambda p, q, _: jnp.where(both_zero(p, q), jnp.zeros_like(q), _log_q(p, q)),
    lambda p, q, _: ratio(p, q),
)
# ∂/∂q log q = 1/q
def_tangents(_log_q, lambda t, p, q: jnp.zeros_like(t), over_if_present)


@public("axis", "axis_name", numbers=("z_loss",))
def cross_entropy_with_logits(
    p: ArrayLike,
    logits: ArrayLike,
    *,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The cross-entropy of a target p and a model's logits, in nats.

    H(p, q) = Σᵢ pᵢ log 1/qᵢ with q = softmax(logits)

    Example:
      >>> p, logits = jnp.array([1.0, 0.0, 0.0]), jnp.array([20.0, 0.0, 0.0])
      >>> print(jce.cross_entropy_with_logits(p, logits), jax.grad(jce.cross_entropy_with_logits, 1)(p, logits))
      4.1223074e-09 [-4.1223074e-09  2.0611537e-09  2.0611537e-09]

    Its relative error is small even when the model is confident and correct: a loss of 1e-30 does not round to 0. As a
    function of q it is minimal at q = p. z_loss adds ζL² with L = log Σ exp logits: the loss is Σᵢ pᵢ log 1/qᵢ + ζL².

    Args:
      p: real, [..., n, ...], the target's probabilities of n classes along `axis`.
      logits: real, [..., n, ...], the model's logits (or log-probabilities). Batch axes broadcast, the class axis
        doesn't.
      z_loss: ζ, a number ≥ 0; training with it pulls L towards 0.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to p and logits. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0. If pᵢ = 0, this class contributes 0, with derivative 0 with respect to
      the logit. If pᵢ > 0, it makes H = +∞, with derivative -pᵢ. In both cases ∂H/∂pᵢ = +∞. A row is NaN if its logits
      hold NaN or +∞, or are all -∞. A traced ζ of 0 adds 0, even if L² overflows.

    Derivative:
      ∂/∂xᵢ = qᵢ Σp - pᵢ + 2ζLqᵢ, ∂/∂pᵢ = log 1/qᵢ, each in its argument's dtype. The derivative with respect to a
      traced ζ is L².

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit, or z_loss is below 0.

    Not checked:
      pᵢ ≥ 0 and Σ pᵢ = 1 (see `check_distribution`). The formula is linear in p, and is evaluated as written even for
      negative pᵢ.

    See "Arguments", "Excluded classes", "Conventions" and "Classes split over devices" in jce/README.md.
    """
    name = "cross_entropy_with_logits"
    (p, x), classes = distributions(name, axis, where, axis_name, in_logits=("logits",), p=p, logits=logits)
    return _with_z_loss(_numbers(name, x, 0.0, z_loss)[1], soft(p, x, classes), x, classes)


@public("axis", "axis_name", "tail", numbers=("label_smoothing", "z_loss"))
def cross_entropy_with_integer_labels(
    labels: ArrayLike,
    logits: ArrayLike,
    *,
    label_probs: ArrayLike | None = None,
    tail: bool = False,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The cross-entropy of integer labels (one-hot targets) and a model's logits, in nats.

    log 1/q_y with q = softmax(logits) and the label y

    Example:
      >>> logits = jnp.array([[20.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
      >>> print(jce.cross_entropy_with_integer_labels(jnp.array([0, 1]), logits))
      [4.1223074e-09 1.4076060e+00]
      >>> top, probs = jnp.array([0, 2]), jnp.array([0.7, 0.2])  # of a teacher of three classes
      >>> print(jce.cross_entropy_with_integer_labels(top, logits[1], label_probs=probs, tail=True))
      1.9076061

    With label_smoothing ε the target is (1-ε) one-hot + ε/n over all n classes, including the label's. z_loss adds ζL²
    with L = log Σ exp logits: the loss is (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζL². No one-hot array is built. The
    relative error of the loss and its gradient is small even when the model is confident and correct: a loss of 1e-30
    does not round to 0.

    With label_probs each target has k labels with one probability each, such as the top-k classes of a teacher. The
    loss is then Σⱼ pⱼ log 1/q_yⱼ. All other classes together are the tail. With `tail`, the loss also includes the
    term (1-Σp) log 1/(1-Σq), where Σp is the sum of label_probs, and Σq is the sum of q over the classes with a label.

    Args:
      labels: integer, [..., ...], class indices: exactly the shape of logits without `axis`; with label_probs [..., k].
      logits: real, [..., n, ...], the model's logits (or log-probabilities) of n classes along `axis`.
      label_probs: real, the shape of labels, [..., k], or None. They aren't normalized. If a label repeats, its
        probabilities add up. To pad a row that has fewer than k labels, use probability 0 and label -1.
      tail: a static bool: whether all classes without a label count as one more outcome, of target probability 1-Σp.
      label_smoothing: ε, a number from 0 to 1.
      z_loss: ζ, a number ≥ 0; training with it pulls L towards 0.
      axis: the axis of the n classes: a static int.
      where: bool, broadcast to logits. False excludes a class, even if it is NaN or infinite, and n counts the
        remaining classes. To mask rows, pass `jnp.expand_dims(mask, axis)`, for example with mask = labels >= 0: a
        masked row gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      [..., ...], the shape of logits without `axis`; float32, or float64 if logits or label_probs is.
      `cross_entropy_with_logits` with one-hot targets rounds differently. In float32 on a CPU, 20 to 45 % of the
      results differ: nearly all of these by one ulp, a few by up to 5.

    At the boundary:
      A label outside [0, n) makes its own row NaN, in value and gradient. A negative label never counts from the end.
      With label_probs, a label outside [0, n) contributes 0 if its probability is 0.

      A logit of -∞ is a class of probability 0: it contributes 0, with derivative 0. At the label, or with label
      smoothing, it makes the loss +∞. The derivative is then as below, with qᵢ = 0. A row with a NaN, a +∞ or only -∞
      is NaN.

      A traced ε of 0 is like no smoothing: a logit of -∞ has no effect on the loss, except at the label. The derivative
      with respect to a traced ε is NaN if the label's logit is -∞. If only logits of other classes are -∞, it is +∞.

      A tail without classes (every class that `where` keeps has a label) contributes 0. A tail whose logits are all -∞
      contributes (1-Σp) · ∞, or 0 with derivative 0 if |Σp - 1| ≤ 4 eps of label_probs' dtype. So don't cast
      label_probs to a wider dtype. If Σp exceeds 1 by no more than 4 eps, 1-Σp counts as 0 in the value, and the
      derivative with respect to p is as below.

    Derivative:
      ∂/∂xᵢ = qᵢ - (1-ε) [i = y] - ε/n + 2ζLqᵢ, in logits' dtype. [·] is the Iverson bracket: 1 if true, otherwise 0.
      At ε = ζ = 0 the relative error is small for every i. (But if XLA flushes subnormal numbers to 0, and the label's
      logit is below 0, derivatives below 1e-31 may become 0.) The derivative with respect to a traced ε is
      1/n Σᵢ log 1/qᵢ - log 1/q_y, and with respect to a traced ζ it is L².

      With label_probs, smoothing turns the target p into (1-ε)p + εΣp/n. At ε = ζ = 0 the derivative with respect to xᵢ
      is qᵢ Σp - pᵢ, and the derivative with respect to pⱼ is log 1/q_yⱼ. A tail adds (1-Σp)(qᵢ - [no label is i]
      qᵢ/(1-Σq)) to the first of these, and -log 1/(1-Σq) to the second.

    Raises:
      TypeError: labels are not integers, logits or label_probs not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit; label_smoothing is not in [0, 1], or z_loss is below 0; tail is
        not a bool, or it is True without label_probs.

    Not checked:
      label_probs ≥ 0: the formula is linear in them, and is evaluated as written.

    See "Arguments", "Excluded classes", "Conventions" and "Classes split over devices" in jce/README.md.
    """
    name = "cross_entropy_with_integer_labels"
    if label_probs is not None:
        y, p, x, kept, classes = labelled_with_probs(name, axis, where, axis_name, labels, label_probs, logits)
        e, z = _numbers(name, x, label_smoothing, z_loss)
        rounded = rounding(jnp.asarray(label_probs), p.dtype) if tail else None
        return _with_z_loss(z, sparse_cross_entropy(y, p, x, kept, e, rounded, classes), x, classes)
    require_no_tail(name, tail)
    y, x, kept, classes = labelled(name, axis, where, axis_name, labels, logits)
    e, z = _numbers(name, x, label_smoothing, z_loss)
    all_kept = where is None and jnp.asarray(logits).shape[classes.axis] > 0
    return label_loss(y, x, e, None if all_kept else kept, z, classes)


def _numbers(name, x, label_smoothing, z_loss):
    """ε and ζ as arrays, or None for a Python 0."""
    smoothing = fraction(name, x.dtype, label_smoothing=label_smoothing)
    numbers = smoothing, positive(name, x.dtype, z_loss=z_loss, or_zero=True)
    return [None if or_none(number) is None else jnp.asarray(number, x.dtype) for number in numbers]


def _with_z_loss(z_loss, loss, x, classes):
    return loss if z_loss is None else loss + log_sum_penalty(x, z_loss, classes)
