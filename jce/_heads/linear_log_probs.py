"""Each token's log-probability of its label or labels, entropy, and log Z, at hidden · headᵀ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike

from jce._heads.arguments.heads import linear_of
from jce._heads.arguments.labels import checked_labels
from jce._heads.arguments.numbers import checked_temperature
from jce._heads.arguments.options import Options
from jce._heads.linear import Linear
from jce._heads.loss.chunk import ChunkFunction
from jce._heads.loss.temperature import at_temperature, whole_log_sum
from jce._heads.over_tokens import over_tokens
from jce._jax.arguments import described
from jce._jax.classes import Classes
from jce._jax.public import public
from jce._numerics.calculus import negative
from jce._quantities.entropy import entropy_of_softmax
from jce._quantities.label_log_probs import log_probs_and_tail, log_probs_of
from jce._quantities.label_loss import label_loss
from jce._softmax.softmax import logsumexp


@functools.partial(register_namedtuple_serialization, serialized_name="jce.LogProbs")
class LogProbs(NamedTuple):
    """log q_y and H(q) of each token."""

    log_prob: Array
    entropy: Array

    @property
    def log_normalizer(self) -> Array:
        raise AttributeError("linear_log_probs: log_normalizer is there where it is asked for: log_normalizer=True.")


@functools.partial(register_namedtuple_serialization, serialized_name="jce.LogProbsAndNormalizer")
class LogProbsAndNormalizer(NamedTuple):
    """log q_y, H(q) and log Z of each token. A type of its own, so that `LogProbs` unpacks to two arrays."""

    log_prob: Array
    entropy: Array
    log_normalizer: Array


@public(
    "tail",
    "log_normalizer",
    "chunk_size",
    "batch_invariant",
    "precision",
    "axis_name",
    numbers=("temperature", "logit_soft_cap"),
)
def linear_log_probs(
    labels: ArrayLike,
    hidden: ArrayLike | Linear,
    head: ArrayLike | Callable | None = None,
    bias: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    tail: bool = False,
    log_normalizer: bool = False,
    logit_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    precision: Any = None,
    axis_name: Hashable | None = None,
) -> LogProbs:
    """log q_y and H(q) at q = softmax(x), x = hidden · headᵀ + bias, in nats: what policy gradients need of each token.

    Example:
      >>> labels, hidden, head = jnp.array([0, 2]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> print(*jce.linear_log_probs(labels, hidden, head))
      [-4.1223074e-09 -2.0000000e+01] [8.6568456e-08 8.6568456e-08]

    Both come from one pass over the head, in the chunks of `linear_cross_entropy`: x never exists for all tokens. The
    ratio of two policies is exp of the difference of their log-probabilities (NaN where both are -∞).
    Log-probabilities and entropies are relatively accurate where the policy is sure.

    Args:
      labels: integer, [...], class indices y, the actions: the shape of hidden without its last axis. Or [..., k] for k
        labels of each token, such as a teacher's likeliest classes; [B, S, 1] means k = 1.
      hidden: real, [..., d], a state for each token. Or a `Linear`, which stands for the next two and the soft cap too.
      head: real, [n, d], a row for each class: kernel.T of a flax Dense, even if n = d. Or a function: see `Linear`.
      bias: real, [n]. A class with bias -∞ is forbidden: it has probability 0.
      where: bool, broadcast to the token axes. A token where it is False has results of 0, and costs no product.
      temperature: T > 0, a number or an array of one for each token: q is softmax(x/T). A traced 0 is greedy.
      tail: a static bool. True appends log(1-Σq), of all classes without a label, to the log-probabilities of k labels,
        which must be distinct; it is accurate where 1-Σq would cancel. `kl_divergence_with_logits` of a teacher's k+1
        and a student's is then the KL divergence of k+1 outcomes, as `log_probs_with_integer_labels` says. It costs
        another pass over logits.
      log_normalizer: a static bool. True gives log Z = log Σ exp(xᵢ/T) too, as a third field of that name.
        log Z + log q_y is the label's logit x_y/T; log² Z times a number is a z-loss.
      logit_soft_cap: c > 0, a number: x is then c tanh((hidden · headᵀ + bias)/c). None for none.
      chunk_size: the number of tokens in a chunk, a static int. None for the rule of `linear_cross_entropy`.
      batch_invariant: a static bool: the same bits for a token in any batch, at a chunk_size, which must be given.
      precision: of the matrix products, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: in `jax.shard_map`, the mesh axis of the classes. With check_vma=False, a `jax.grad` inside is wrong.

    Returns:
      A named tuple: log_prob ≤ 0, of the shape of labels (with a tail [..., k+1]); entropy ≥ 0, [...]; and with
      log_normalizer a field of that name, [...]. float32, or float64 if hidden, head or bias is. A field that isn't
      used costs nothing under `jax.jit`.

    At the boundary:
      A label outside [0, n) makes its log_prob NaN, in value and gradient, and nothing else. A forbidden class
      contributes 0 to the entropy and to Z, with derivative 0; as the label it has log_prob -∞, and so has a tail all
      of whose classes are forbidden.

    Derivative:
      ∂ log q_y/∂xᵢ = ([i = y] - qᵢ)/T, ∂H/∂xᵢ = qᵢ (log 1/qᵢ - H)/T, ∂ log Z/∂xᵢ = qᵢ/T, and on to hidden, head and
      bias, each in its own dtype, and in T. Forward and reverse mode, any order; the gradient costs four matrix
      products.

    Raises:
      TypeError: labels are not integers, hidden, head, bias or temperature not real, or `where` not boolean.
      ValueError: shapes disagree, there is a tail without an axis of k labels, or an option is none of those above.

    Not checked:
      Values.

    See "Arguments of heads", "Classes split over devices" and "Conventions" in jce/README.md.
    """
    name = "linear_log_probs"
    x = linear_of(name, hidden, head, bias, logit_soft_cap)
    y, h = checked_labels(name, labels, x, several=True), jnp.asarray(x.hidden)
    if tail and y.ndim != h.ndim:
        raise ValueError(
            f"{name}: with a tail, labels must have an axis for k labels of each token last, {(*h.shape[:-1], 'k')};"
            f" got {described({'labels': y, 'hidden': h})}. One label is k = 1: labels[..., None]."
        )
    of_tokens = {"labels": y} | checked_temperature(name, temperature, h.shape[:-1])
    options = Options(where, None, "none", chunk_size, precision, axis_name, batch_invariant)
    results = over_tokens(name, functools.partial(_chunk_function, tail, log_normalizer), {"": x}, of_tokens, options)
    return cast(LogProbs, results)  # type checkers can't tell the two tuples apart by an option


def _chunk_function(tail, log_normalizer, logits, others, _, class_axis):
    classes, (k, dtype) = Classes(-1, class_axis, any_shift=False), (others[0].shape, logits[0].dtype)
    at_labels = log_probs_and_tail if tail else log_probs_of if k else _log_prob

    def statistics(logits, others, *_):
        (x,), (y, *temperature) = logits, others
        t = temperature[0] if temperature else None
        z = at_temperature(x, t, classes)
        both = [at_labels(y, z, classes), entropy_of_softmax(z, classes)]
        return [*both, whole_log_sum(logsumexp(z, classes), x, t, classes)] if log_normalizer else both

    log_prob, number = jnp.zeros([n + tail for n in k], dtype), jnp.zeros((), dtype)
    one = LogProbsAndNormalizer(log_prob, number, number) if log_normalizer else LogProbs(log_prob, number)
    return ChunkFunction(statistics, one)


def _log_prob(y, x, classes):
    return negative(label_loss(y, x, None, None, None, classes))
