"""Per token, the log-probability of its label or labels, the entropy, and log Z, at logits = hidden · headᵀ."""

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
        raise AttributeError(
            "linear_log_probs: this result has no log_normalizer. Pass log_normalizer=True to linear_log_probs."
        )


@functools.partial(register_namedtuple_serialization, serialized_name="jce.LogProbsAndNormalizer")
class LogProbsAndNormalizer(NamedTuple):
    """log q_y, H(q) and log Z of each token. It is a separate type, so that `LogProbs` unpacks to two arrays."""

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
    """Log-probabilities of labels and entropies of softmax(hidden · headᵀ + bias), in nats, for policy gradients.

    Example:
      >>> labels, hidden, head = jnp.array([0, 2]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> print(*jce.linear_log_probs(labels, hidden, head))
      [-4.1223074e-09 -2.0000000e+01] [8.6568456e-08 8.6568456e-08]

    With x = hidden · headᵀ + bias and q = softmax(x), it returns log q_y and the entropy H(q) for each token, in one
    pass over the head. As in `linear_cross_entropy`, x exists for one chunk of tokens at a time. The probability ratio
    of two policies is exp of the difference of their log-probabilities. If both log-probabilities are -∞, the ratio is
    NaN. The relative error of log-probabilities and entropies is small even when the policy is confident.

    Args:
      labels: integer, [...]: class indices y, the actions, in the shape of hidden without its last axis. Or [..., k]
        for k labels per token, for example the top-k classes of a teacher. Labels [B, S, 1] for hidden states [B, S, d]
        mean k = 1.
      hidden: real, [..., d]: one state per token. Or a `Linear`, which also takes the place of head, bias and
        logit_soft_cap.
      head: real, [n, d]: one row per class. For a Dense layer of Flax this is kernel.T, even if n = d. Or a function:
        see `Linear`.
      bias: real, [n]. A bias of -∞ forbids a class: its probability is 0, even with a soft cap.
      where: bool, broadcast to the token axes. Tokens where it is False are masked: their results are 0, and they cost
        no matmul.
      temperature: T > 0, a number, or an array with a number for each token: q is softmax(x/T). An array is not checked
        and may hold 0: the results are then the limits as T → 0.
      tail: a static bool: whether to append log(1-Σq), where Σq is over the k labels, to their log-probabilities. It is
        the log-probability of all other classes together, and accurate even if Σq is near 1. The labels of a token must
        be distinct. For KL(teacher‖student) over these k+1 outcomes, pass the log_prob of both to
        `kl_divergence_with_logits`: see `log_probs_with_integer_labels`. A tail costs another pass over the logits.
      log_normalizer: a static bool: whether to return also log Z = log Σ exp(xᵢ/T), as a third field of that name. The
        label's logit x_y/T is log Z + log q_y, and a z-loss is a multiple of (log Z)².
      logit_soft_cap: c > 0: x is then c tanh((hidden · headᵀ + bias)/c). None for no cap.
      chunk_size: the number of tokens per chunk, a static int. None for the rule of `linear_cross_entropy`.
      batch_invariant: a static bool: whether a token's result has the same bits in every batch. It needs a chunk_size.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      A named tuple: log_prob ≤ 0, in the shape of labels (with a tail [..., k+1]); entropy ≥ 0, [...]; and with
      log_normalizer a field of that name, [...]. float32, or float64 if hidden, head or bias is float64. Under
      `jax.jit`, a field that you do not use costs nothing.

    At the boundary:
      A label outside [0, n) makes its own log_prob NaN, and no other result. A gradient through this log_prob is NaN
      for the token's hidden state, and for the whole head and bias. Mask such tokens, for example with
      where=labels >= 0. With k labels per token, mask such entries of log_prob with jnp.where. A class with a bias of
      -∞ contributes 0 to the entropy and to Z, with derivative 0. If it is the label, its log_prob is -∞. A tail is -∞
      if all of its classes have a bias of -∞.

    Derivative:
      ∂ log q_y/∂xᵢ = ([i = y] - qᵢ)/T, ∂H/∂xᵢ = qᵢ (log 1/qᵢ - H)/T, ∂ log Z/∂xᵢ = qᵢ/T, and, by the chain rule,
      derivatives with respect to hidden, head, bias and T. Each gradient has its argument's dtype. Derivatives exist in
      forward and reverse mode, to any order. The results with their gradient cost four matmuls.

    Raises:
      TypeError: labels are not integers; hidden, head, bias or temperature is not real; or `where` is not boolean.
      ValueError: shapes disagree; there is a tail but no axis of k labels; or an option has a value that is not listed
        above.

    Not checked:
      Values inside of arrays. A NaN in a token's hidden state makes the results of this token NaN.

    See "Arguments of heads", "Classes split over devices" and "Conventions" in jce/README.md.
    """
    name = "linear_log_probs"
    x = linear_of(name, hidden, head, bias, logit_soft_cap)
    y, h = checked_labels(name, labels, x, several=True), jnp.asarray(x.hidden)
    if tail and y.ndim != h.ndim:
        raise ValueError(
            f"{name}: with a tail, labels must have an axis for k labels per token after the token axes,"
            f" {(*h.shape[:-1], 'k')}; got {described({'labels': y, 'hidden': h})}. For one label per token, pass"
            f" labels[..., None]."
        )
    of_tokens = {"labels": y} | checked_temperature(name, temperature, h.shape[:-1])
    options = Options(where, None, "none", chunk_size, precision, axis_name, batch_invariant)
    results = over_tokens(name, functools.partial(_chunk_function, tail, log_normalizer), {"": x}, of_tokens, options)
    return cast(LogProbs, results)  # for type checkers, which can't tell which of the two tuples an option selects


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
