"""The label's cross-entropy at logits = hidden · headᵀ, without the logits of all tokens, at three matrix products.

While a chunk's logits x are there, so is ∂ℓ/∂x, and with it ∂ℓ/∂h = ∂ℓ/∂x · W and the chunk's part of the head's
gradient, (∂ℓ/∂x)ᵀ h. A sum of losses therefore has value and gradient from one loop. A loss for each token has to wait
for its cotangent, and computes x again: a fourth product.
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
    """log 1/q_y at q = softmax(x), x = hidden · headᵀ + bias, in nats, of many tokens: a head and its loss in one.

    Example:
      >>> labels, hidden, head = jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> print(jce.linear_cross_entropy(labels, hidden, head))
      4.1223074e-09

    What `cross_entropy_with_integer_labels` is of x, but x never exists for more than a chunk of tokens, in any
    derivative of any order. Loss and gradient of a mean or a sum cost three matrix products of the size of x's own, a
    loss for each token four. With label_smoothing ε and z_loss ζ a token's loss is
    (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζ (log Σ exp xᵢ)².

    Args:
      labels: integer, [...], class indices y: the shape of hidden without its last axis; with label_probs [..., k].
      hidden: real, [..., d], a state for each token. Or a `Linear`, which stands for the next two and the soft cap too.
      head: real, [n, d], a row for each class: kernel.T of a flax Dense, even if n = d. Or a function: see `Linear`.
      bias: real, [n]. A class with bias -∞ is forbidden: it has probability 0.
      label_probs: real, [..., k], the shape of labels, or None: probabilities p of k labels a token, as of a teacher
        whose likeliest classes are kept. As in `cross_entropy_with_integer_labels`, as is `tail`.
      tail: whether all classes without a label count as one more outcome, of what is left of the target: a static bool.
      weights: real, broadcast to the token axes: w, each token's weight. If Σ w may be 0, take reduction="sum".
      where: bool, broadcast to the token axes. A token where it is False takes no part, and costs no product.
      reduction: "mean" for Σ wℓ / Σ w, or 0 if Σ w = 0; "sum" for Σ wℓ; "none" for wℓ, a number for each token.
      label_smoothing: ε, a number from 0 to 1.
      z_loss: ζ, a number ≥ 0.
      temperature: T > 0, a number or an array of one for each token: x is then divided by T, after the soft cap. An
        array, which may hold 0, isn't checked: q is then its limit as T → 0.
      logit_soft_cap: c > 0, a number: x is then c tanh((hidden · headᵀ + bias)/c). None for none.
      chunk_size: the number of tokens in a chunk, a static int. None for about max(512, 2²⁰/n) on a CPU and
        max(2048, 2²⁶/n) on an accelerator. Fewer need less memory.
      batch_invariant: a static bool: the same bits for a token in any batch, at a chunk_size, which must be given.
      precision: of the matrix products, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: in `jax.shard_map`, the mesh axis of the classes. With check_vma=False, a `jax.grad` inside is wrong.

    Returns:
      A number, or [...] for "none"; float32, or float64 if hidden, head, bias, weights or label_probs is. Beyond
      arguments and results it needs a few arrays of chunk × n, in reverse mode one or two of the head's shape, and some
      of [..., d]. For faster products of bfloat16 states cast a float32 head, as by head.astype(hidden.dtype).

    At the boundary:
      A label outside [0, n) makes its token NaN, in value and gradient, and with it a mean or a sum: mask such labels,
      as with where=labels >= 0. At a weight of 0 the derivative in the weight is ℓ as at any other, but a token of
      weight 0 with a label outside [0, n) or a hidden state that isn't finite is left out as by `where`. A forbidden
      class has the derivative below at qᵢ = 0, and 0 under a soft cap. At the label it makes the loss +∞, and with
      label smoothing, which counts every class, every loss +∞: better slice off what pads the vocabulary, head[:n]. A
      traced ε of 0 is no smoothing: forbidden classes then cost nothing.

    Derivative:
      ∂ℓ/∂xᵢ = qᵢ - (1-ε) [i = y] - ε/n + 2ζ qᵢ log Σ exp x, and on to hidden, head, bias and weights, each in its own
      dtype: argnums 1, 2 and 3 for `jax.grad`. In a traced number and in temperatures too, by another pass. Forward and
      reverse mode, any order.

    Raises:
      TypeError: labels are not integers, hidden, head, bias, weights or temperature not real, or `where` not boolean.
      ValueError: shapes disagree, or an option is none of those above.

    Not checked:
      Values.

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
