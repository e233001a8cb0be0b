"""Cross-entropy of labels at logits = hidden · headᵀ, with three matmuls and without the logits of all tokens.

While the logits x of a chunk are in memory, the loop computes ∂ℓ/∂x from them, and from that ∂ℓ/∂h = ∂ℓ/∂x · W and the
chunk's part of the head's gradient, (∂ℓ/∂x)ᵀ h. So a single loop computes a sum of losses and its gradient. The
gradient of losses per token can't be computed before their cotangents are known, so x is recomputed: a fourth matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.arguments.heads import linear_of
from jce._heads.arguments.labels import checked_label_probs, checked_labels
from jce._heads.arguments.numbers import checked_numbers, checked_temperature
from jce._heads.arguments.options import Options
from jce._heads.linear import Linear
from jce._heads.loss.chunk import ChunkFunction
from jce._heads.loss.label_excess import LabelLoss, Target
from jce._heads.loss.label_loss import losses_of
from jce._heads.loss.sparse_labels import are_classes, sparse_labels_loss
from jce._heads.over_tokens import over_tokens
from jce._jax.arguments import is_array
from jce._jax.classes import Classes
from jce._jax.labels import require_no_tail
from jce._jax.public import public


@public(
    *("tail", "reduction", "chunk_size", "batch_invariant", "precision", "axis_name"),
    numbers=("label_smoothing", "z_loss", "temperature", "logit_soft_cap"),
)
def linear_cross_entropy(
    labels: ArrayLike,
    hidden: ArrayLike | Linear,
    head: ArrayLike | Callable | None = None,
    bias: ArrayLike | None = None,
    *,
    label_probs: ArrayLike | None = None,
    tail: bool = False,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    precision: Any = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The cross-entropy of labels with softmax(hidden · headᵀ + bias), in nats: a head and its loss in one call.

    Example:
      >>> labels, hidden, head = jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> print(jce.linear_cross_entropy(labels, hidden, head))
      4.1223074e-09

    A head is the output projection of a model: the matrix that multiplies hidden states to give logits. A token's loss
    is `cross_entropy_with_integer_labels` at the logits x = hidden · headᵀ + bias, and the default result is their
    mean. But x exists for one chunk of tokens at a time, in the value and in derivatives of any order. A mean or a sum
    with its gradient costs three matmuls between hidden states and head; losses per token with their gradient cost
    four. With label_smoothing ε, z_loss ζ and q = softmax(x), the loss of a token is

      ℓ = (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζ (log Σ exp xᵢ)².

    Args:
      labels: integer, [...]: class indices y, in the shape of hidden without its last axis. With label_probs, [..., k].
      hidden: real, [..., d]: one state per token. Or a `Linear`, which also takes the place of head, bias and
        logit_soft_cap.
      head: real, [n, d]: one row per class. For a Dense layer of Flax this is kernel.T, even if n = d. Or a function:
        see `Linear`.
      bias: real, [n]. A bias of -∞ forbids a class: its probability is 0, even with a soft cap.
      label_probs: real, [..., k], in the shape of labels, or None: target probabilities p of k labels per token, for
        example the top-k probabilities of a teacher. See `cross_entropy_with_integer_labels`, also for tail.
      tail: a static bool: whether all classes without a label count as one more outcome, which has the remaining target
        probability.
      weights: real, broadcast to the token axes: w, one weight per token, by default 1. If they sum to 0, as RL
        advantages can, a mean is 0: use reduction="sum".
      where: bool, broadcast to the token axes. Tokens where it is False are masked: their loss and weight are 0, and
        they cost no matmul.
      reduction: "mean" for Σ wℓ / Σ w, which is 0 if Σ w = 0; "sum" for Σ wℓ; "none" for wℓ, one number per token.
      label_smoothing: ε, a number from 0 to 1.
      z_loss: ζ, a number ≥ 0.
      temperature: T > 0, a number, or an array with a number for each token. x is divided by T, after the soft cap. An
        array is not checked and may hold 0: q is then the limit as T → 0.
      logit_soft_cap: c > 0: x is then c tanh((hidden · headᵀ + bias)/c). None for no cap.
      chunk_size: the number of tokens per chunk, a static int. None for about max(512, 2²⁰/n) on a CPU (2²³/n if
        n < 256), and max(2048, 2²⁶/n) on a GPU or TPU (often 4096 on a TPU if both arrays are bfloat16). Smaller
        chunks need less memory.
      batch_invariant: a static bool: whether a token's result has the same bits in every batch. It needs a chunk_size.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      A number, or [...] for "none". float32, or float64 if hidden, head, bias, weights or label_probs is float64.
      Besides arguments and results, the call needs memory for a few arrays [chunk_size, n] and some arrays [..., d].
      Reverse mode needs one or two more arrays of the head's shape. For faster matmuls with bfloat16 states, cast a
      float32 head: head.astype(hidden.dtype).

    At the boundary:
      A label outside [0, n) makes the loss and the gradient of its token NaN, and therefore also a mean or a sum. Mask
      such labels, for example with where=labels >= 0. For "sum" and "none", the derivative with respect to a weight is
      ℓ, even at a weight of 0. But a token of weight 0 is masked, as by `where`, if its label is outside [0, n) or its
      hidden state is not finite.

      A class whose bias is -∞ is forbidden. With a soft cap, the derivative with respect to its logit is 0.
      Otherwise it is as below, with qᵢ = 0. If the label is forbidden, the loss is +∞. Label smoothing counts every
      class, so a forbidden class makes every loss +∞: slice off the classes that only pad the vocabulary, as in
      head[:vocabulary_size]. If ε is traced and 0, nothing is smoothed, and forbidden classes add nothing to the loss.
      The derivative with respect to a traced ε is NaN if the label is forbidden, and +∞ if only other classes are.

    Derivative:
      ∂ℓ/∂xᵢ = qᵢ - (1-ε) [i = y] - ε/n + 2ζ qᵢ log Σ exp x, and, by the chain rule, derivatives with respect to hidden,
      head and bias (argnums 1, 2 and 3 of `jax.grad`). Weights have derivatives too. Each gradient has its argument's
      dtype. Derivatives with respect to traced numbers and temperatures take another pass over the tokens. Derivatives
      exist in forward and reverse mode, to any order.

    Raises:
      TypeError: labels are not integers, another array is not real, or `where` is not boolean.
      ValueError: shapes disagree, or an option has a value that is not listed above.

    Not checked:
      Values inside of arrays. A NaN in a token's hidden state makes the results of this token NaN.

    See "Arguments of heads", "Classes split over devices" and "Conventions" in jce/README.md.
    """
    name = "linear_cross_entropy"
    x = linear_of(name, hidden, head, bias, logit_soft_cap)
    known, traced = checked_numbers(name, label_smoothing, z_loss)
    if label_probs is None:
        require_no_tail(name, tail)
        of_tokens = {"labels": checked_labels(name, labels, x)}
        may_be_greedy, is_capped = is_array(temperature), x.logit_soft_cap is not None
        make = functools.partial(_chunk_function, known, may_be_greedy, is_capped, x.of_function)
        is_defined = _is_class
    else:
        y, p = checked_label_probs(name, labels, label_probs, x)
        of_tokens = {"labels": y, "label_probs": p}
        make, is_defined = functools.partial(sparse_labels_loss, name, known, tail), are_classes
    of_tokens |= checked_temperature(name, temperature, jnp.shape(x.hidden)[:-1])
    options = Options(where, weights, reduction, chunk_size, precision, axis_name, batch_invariant)
    return over_tokens(name, make, {"": x}, of_tokens, options, traced, is_defined=is_defined)


def _chunk_function(
    known: dict[str, Any], may_be_greedy: bool, is_capped: bool, of_function: bool, logits, others, _, class_axis
) -> ChunkFunction:
    (x,), (_, *temperature) = logits, others
    number, dtype = jax.ShapeDtypeStruct((), x.dtype), x.dtype
    loss = LabelLoss(Classes(-1, class_axis), may_be_greedy=may_be_greedy, **known)

    def losses(logits, others, traced, _):
        (x,), (y, *t) = logits, others
        return [losses_of(loss, Target(y, t[0].astype(dtype) if t else None, traced), x)]

    if of_function:
        return ChunkFunction(losses, number)
    halved = loss.may_read_once(bool(temperature), is_capped)
    return ChunkFunction(losses, number, multiplied=False, halved=halved, filler=(0, 1))  # label, temperature


def _is_class(others: list[Array], n: int) -> Array:
    y, *_ = others
    return (y >= 0) & (y < n)
