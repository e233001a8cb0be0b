"""The log-probability of each token's label, and the entropy of its distribution, at logits = hidden · headᵀ."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike

from jce._arguments import wide_enough
from jce._calculus import negative
from jce._classes import Classes
from jce._cross_entropy import label_surprisal
from jce._entropy import entropy_of_softmax
from jce._heads.chunks import checked
from jce._heads.linear import Linear
from jce._heads.over_tokens import OfChunk, TokenOptions, over_tokens
from jce._public import public


@functools.partial(register_namedtuple_serialization, serialized_name="jce.LogProbs")
class LogProbs(NamedTuple):
    """log q_y and H(q), a number for each token."""

    log_prob: Array
    entropy: Array


@public("chunk_size", "precision", "axis_name", numbers=("logit_soft_cap",))
def linear_log_probs(
    labels: ArrayLike,
    hidden: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    logit_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
    axis_name: Hashable | None = None,
) -> LogProbs:
    """log q_y and H(q) at q = softmax(x), x = hidden · headᵀ + bias, in nats: what policy gradients ask of each token.

    Both from one pass over the head, in the chunks of `linear_cross_entropy`: x never exists for all tokens. A policy's
    ratio to another is exp of the difference of two log-probabilities (NaN where both are -∞). Relatively accurate
    where the policy is sure.

    Args:
      labels: integer, [...], class indices y, the actions: the shape of hidden without its last axis.
      hidden: real, [..., d], a state for each token.
      head: real, [n, d], a row for each class, as in `linear_cross_entropy`: of a Dense layer of flax, kernel.T.
      bias: real, [n]. A class with bias -∞ is forbidden: it has probability 0.
      where: bool, broadcasts to the shape of labels. Where it is False, both are 0, with derivative 0, whatever label
        and hidden hold; and such tokens cost no product, as in `linear_cross_entropy`.
      logit_soft_cap: c > 0, a number: x is then c tanh((hidden · headᵀ + bias)/c). None for none. A traced one isn't
        checked.
      chunk_size: the number of tokens in a chunk, a static int. None for the rule of `linear_cross_entropy`.
      precision: of the matrix products, as in `linear_cross_entropy`.
      axis_name: as in `linear_cross_entropy`.

    Returns:
      A named tuple: log_prob ≤ 0 and entropy ≥ 0, each of the shape of labels; float32, or float64 if an argument is.

    At the boundary:
      A label outside [0, n) makes its log_prob NaN, in value and gradient; the entropy doesn't depend on it. A
      forbidden class contributes 0 to the entropy, with derivative 0; at the label it makes log_prob -∞. No classes
      make both 0.

    Derivative:
      ∂ log q_y/∂xᵢ = [i = y] - qᵢ, ∂H/∂xᵢ = qᵢ (log 1/qᵢ - H), and on to hidden, head and bias, each in its own dtype.
      Forward and reverse mode, any order; the gradient costs four matrix products.

    Raises:
      TypeError: labels are not integers, hidden, head or bias not real, or `where` not boolean.
      ValueError: shapes disagree, or an option is none of those above.

    Not checked:
      Values. Results below the smallest normal number are 0 where XLA flushes them, as it does on a CPU.

    Example:
      >>> labels, hidden, head = jnp.array([0, 2]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> print(*jce.linear_log_probs(labels, hidden, head))
      [-4.1223074e-09 -2.0000000e+01] [8.6568456e-08 8.6568456e-08]
    """
    name = "linear_log_probs"
    got = checked(name, labels, hidden, head, bias=bias, where=where)
    logits = Linear(got["hidden"], got["head"], got.get("bias"), logit_soft_cap)
    options = TokenOptions(where=where, chunk_size=chunk_size, precision=precision, axis_name=axis_name)
    return over_tokens(name, _of_chunk, {"labels": wide_enough(got["labels"]), "logits": logits}, options)


def _of_chunk(one, _, class_axis):
    classes, number = Classes(-1, class_axis), jnp.zeros((), one[1].dtype)

    def log_prob_and_entropy(chunk, *_):
        return [negative(label_surprisal(*chunk, classes)), entropy_of_softmax(chunk[1], classes)]

    return OfChunk(log_prob_and_entropy, LogProbs(number, number))
