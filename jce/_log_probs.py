"""log q at one label of each row, or at k, and of all other classes together."""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._arguments import as_array, labelled, labelled_several
from jce._calculus import negative
from jce._label_log_probs import log_probs_and_tail, log_probs_of
from jce._label_surprisal import label_surprisal
from jce._public import public


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
    """log q_y at q = softmax(logits), in nats: the log-probability of a label y of each distribution, or of each of k.

    Relatively accurate also where the model is sure. One label's is the negative
    `cross_entropy_with_integer_labels(labels, logits)`; k cost the same one pass over the classes. With `tail` an entry
    more is log (1-Σq), of all classes without a label: so that k labels and a tail are a distribution of k+1 outcomes,
    and the divergence of two such is one, ≥ 0 and 0 at equality, as of a teacher whose likeliest classes are kept:

        teacher = log_probs_with_integer_labels(top, teacher_logits, tail=True)
        kl_divergence_with_logits(teacher, log_probs_with_integer_labels(top, logits, tail=True))

    Store a teacher as these k+1 logarithms. From float32 probabilities a tail 1-Σp of 1e-5 is off by 3e-3 of itself and
    one of 1e-7 by a third, and from bfloat16 ones nothing is left of 1e-3.

    Args:
      labels: integer, class indices: [..., ...], exactly the shape of logits without `axis`, or [..., ..., k], with an
        axis for k labels of each distribution last. [B, 1] of logits [B, n] is k = 1. With a tail k of them, which must
        be distinct.
      logits: real, [..., n, ...], the model's logits (or log-probabilities) of n classes along `axis`.
      tail: whether the last entry is of all classes without a label: a static bool.
      axis: the axis of the n classes: a static int.
      where: bool, broadcasts to the shape of logits. A class where it is False has probability 0, whatever it holds; a
        distribution with nothing left is 0 in each entry, with gradient 0. So `where=mask[..., None]` drops rows.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the classes are split; the result
        is the same on all its devices. None where each device has all classes. Under `check_vma=False` differentiate
        outside of the `shard_map`: inside, a gradient is wrong without an error, as plain JAX's of a `psum` is.

    Returns:
      The shape of labels; with a tail [..., ..., k+1]. float32, or float64 if logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0: log q is -∞ at it, with the derivative of the formula. A label outside
      [0, n) makes its own entry NaN, and what is differentiated through it; it never counts from the end, and in the
      tail it counts for nothing. Pad lists with n, and leave the padding out of what follows by `where`. A tail of no
      class, or of classes that are all at -∞, is -∞. A NaN, a +∞ or nothing but -∞ among the logits makes a row NaN.
      n = 0 gives 0.

    Derivative:
      ∂/∂xᵢ = [i = y] - qᵢ, in logits' dtype; of the tail [no label is i] qᵢ/(1-Σq) - qᵢ. Relatively accurate for every
      i, as far as the rounding of x - max x allows.

    Raises:
      TypeError: labels are not integers, logits not real, or `where` not boolean.
      ValueError: labels don't have the shape of logits without the class axis, or one axis more, tail is no bool, or
        True without that one, there is no class axis, `axis` is not an int in range, or `where` doesn't broadcast.

    Not checked:
      Values, nor that labels are distinct: with a tail one that repeats counts twice. Results below the smallest normal
      number are 0 where XLA flushes them, as it does on a CPU.

    Example:
      >>> logits = jnp.array([[20.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
      >>> print(jce.log_probs_with_integer_labels(jnp.array([0, 1]), logits))
      [-4.1223074e-09 -1.4076060e+00]
      >>> print(jce.log_probs_with_integer_labels(jnp.array([[0], [2]]), logits, tail=True))
      [[-4.1223074e-09 -1.9306852e+01]
       [-4.0760595e-01 -1.0943444e+00]]
    """
    name = "log_probs_with_integer_labels"
    if not tail and as_array(name, "labels", labels).ndim < as_array(name, "logits", logits).ndim:
        y, x, _, classes = labelled(name, axis, where, axis_name, labels, logits, several="one axis more, behind")
        return negative(label_surprisal(y, x, classes))
    y, x, kept, classes = labelled_several(name, axis, where, axis_name, labels, logits)
    log_probs = (log_probs_and_tail if tail else log_probs_of)(y, x, classes)
    return log_probs if kept is None else jnp.where(kept, log_probs, jnp.zeros_like(log_probs))
