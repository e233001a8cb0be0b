"""log q at one label or k labels per row, and for all classes without a label together."""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import as_array
from jce._jax.labels import labelled, labelled_several
from jce._jax.public import public
from jce._numerics.calculus import negative
from jce._quantities.label_log_probs import log_probs_and_tail, log_probs_of
from jce._quantities.label_loss import label_loss


@public("axis", "axis_name", "tail")
def log_probs_with_integer_labels(
    labels: ArrayLike,
    logits: ArrayLike,
    *,
    tail: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The log-probabilities of integer labels, one or k per distribution, in nats.

    log q_y with q = softmax(logits) and the label y

    Example:
      >>> logits = jnp.array([[20.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
      >>> print(jce.log_probs_with_integer_labels(jnp.array([0, 1]), logits))
      [-4.1223074e-09 -1.4076060e+00]
      >>> print(jce.log_probs_with_integer_labels(jnp.array([[0], [2]]), logits, tail=True))
      [[-4.1223074e-09 -1.9306852e+01]
       [-4.0760595e-01 -1.0943444e+00]]

    Their relative error is small even when the model is confident. For one label the result is minus
    `cross_entropy_with_integer_labels(labels, logits)`. k labels take the same single pass over the classes.
    With `tail` one more entry is log (1-Σq), for all classes without a label together. (Σq is the sum over the labels.)
    The k labels and the tail are then a distribution of k+1 outcomes. The KL divergence of two such distributions is
    ≥ 0, and it is 0 only if they are equal or if it underflows. Use a tail if you keep only the top-k classes `top` of
    a teacher:

        teacher = log_probs_with_integer_labels(top, teacher_logits, tail=True)
        kl_divergence_with_logits(teacher, log_probs_with_integer_labels(top, logits, tail=True))

    Store such a teacher as these k+1 logarithms. If you store float32 probabilities instead and compute the tail 1-Σp
    from them, a tail of 1e-5 has a relative error of 3e-3, and a tail of 1e-7 of 1/3. From bfloat16 probabilities, a
    tail of 1e-3 has no correct digit.

    Args:
      labels: integer, class indices: [..., ...], exactly the shape of logits without `axis`, or [..., ..., k], with a
        last axis for the k labels of each distribution. Labels [B, 1] for logits [B, n] mean k = 1. With `tail`, give
        the second shape, and labels that are distinct in each distribution.
      logits: real, [..., n, ...], the model's logits (or log-probabilities) of n classes along `axis`.
      tail: a static bool: whether to add a last entry for all classes without a label.
      axis: the axis of the n classes: a static int.
      where: bool, broadcast to logits. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      The shape of labels, or with a tail [..., ..., k+1]; float32, or float64 if logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0: as a label it gives log q = -∞, with the derivative below. A
      label outside [0, n) makes its own entry NaN, and gradients through this entry too. A negative label never counts
      from the end, and a label outside [0, n) takes no class out of the tail. To pad a row that has fewer than k
      labels, use the label n, and mask the padded entries of the result. A tail without classes, or whose logits are
      all -∞, is -∞. A row with a NaN, a +∞ or only -∞ is NaN.

    Derivative:
      ∂/∂xᵢ = [i = y] - qᵢ, in logits' dtype; for the tail it is [no label is i] qᵢ/(1-Σq) - qᵢ. A bracket is 1 if the
      statement in it is true, and otherwise 0. The relative error is small for every i, as far as the rounding of
      x - max x allows.

    Raises:
      TypeError: labels are not integers, logits not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit; tail is not a bool, or it is True and labels lack the axis of k.

    Not checked:
      That labels are distinct. With a tail, a label that repeats counts twice.

    See "Arguments", "Excluded classes", "Conventions" and "Classes split over devices" in jce/README.md.
    """
    name = "log_probs_with_integer_labels"
    if not tail and as_array(name, "labels", labels).ndim < as_array(name, "logits", logits).ndim:
        y, x, _, classes = labelled(
            name, axis, where, axis_name, labels, logits, several="give labels a last axis of length k"
        )
        return negative(label_loss(y, x, None, None, None, classes))
    y, x, kept, classes = labelled_several(name, axis, where, axis_name, labels, logits)
    log_probs = (log_probs_and_tail if tail else log_probs_of)(y, x, classes)
    return log_probs if kept is None else jnp.where(kept, log_probs, jnp.zeros_like(log_probs))
