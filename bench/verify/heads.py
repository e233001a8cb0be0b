"""Measures the errors of a head's value and gradient, against a dense float64 loss on the host's CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jce
from bench.accelerators import HEAD, TWO_HEADS, bonus, bonus_of_token, of_logits
from bench.peers import of_label, surprisal
from bench.search.judging import on_host
from tests.kernels import SMOOTHING, Z_LOSS


class Problem(NamedTuple):
    """The arguments of a head's loss, other than hidden states and head."""

    labels: np.ndarray
    several: np.ndarray
    label_probs: np.ndarray
    hidden: np.ndarray  # the teacher's
    head: np.ndarray


CHUNKED = {"chunk_size": 128}  # a quarter of the tokens
KEPT = np.float32([0.6, 0.3])


def of_several(a, x):
    return (a.label_probs * jnp.take_along_axis(surprisal(x), a.several, -1)).sum(-1)


def kl_of_logits(a, x):
    log_p = -surprisal(a.hidden @ a.head.T)
    return (jnp.exp(log_p) * (log_p + surprisal(x))).sum(-1)


# By name: a loss that takes a problem, hidden states and a head; and a dense loss that takes a problem and logits, and
# returns one number per token or one for all.
LOSSES_OF_HEADS: dict[str, tuple[Callable, Callable]] = {
    HEAD: (
        lambda a, h, w: jce.linear_cross_entropy(a.labels, h, w, **CHUNKED),
        lambda a, x: of_label(surprisal(x), a.labels),
    ),
    f"{HEAD}, z-loss": (
        lambda a, h, w: jce.linear_cross_entropy(a.labels, h, w, z_loss=Z_LOSS, **CHUNKED),
        lambda a, x: of_label(surprisal(x), a.labels) + Z_LOSS * jnp.square(jax.nn.logsumexp(x, -1)),
    ),
    f"{HEAD}, smoothed": (
        lambda a, h, w: jce.linear_cross_entropy(a.labels, h, w, label_smoothing=SMOOTHING, **CHUNKED),
        lambda a, x: (1 - SMOOTHING) * of_label(surprisal(x), a.labels) + SMOOTHING * surprisal(x).mean(-1),
    ),
    f"{HEAD}, label_probs": (
        lambda a, h, w: jce.linear_cross_entropy(a.several, h, w, label_probs=a.label_probs, **CHUNKED),
        of_several,
    ),
    "linear_log_probs": (
        lambda a, h, w: bonus(*jce.linear_log_probs(a.labels, h, w, **CHUNKED)),
        lambda a, x: bonus(*of_logits(a.labels, x)),
    ),
    TWO_HEADS: (
        lambda a, h, w: jce.linear_kl_divergence(jce.Linear(a.hidden, a.head), jce.Linear(h, w), **CHUNKED),
        kl_of_logits,
    ),
    "linear_map": (
        lambda a, h, w: jce.linear_map(bonus_of_token, a.labels, jce.Linear(h, w), reduction="mean", **CHUNKED),
        lambda a, x: bonus(*of_logits(a.labels, x)),
    ),
}


def head_errors(name: str, dtype=np.float32, tokens: int = 512, width: int = 64, n: int = 1000) -> list[dict]:
    """Errors of value and gradient, relative to the largest entry of each. Float32 matmuls use precision="highest"."""
    loss, dense = LOSSES_OF_HEADS[name]
    rng = np.random.default_rng(2026)
    h, teacher = (3 * rng.standard_normal((tokens, width), np.float32) for _ in range(2))
    w, head = (rng.standard_normal((n, width), np.float32) / np.float32(width**0.5) for _ in range(2))
    several = np.argsort(rng.random((tokens, n)), axis=-1)[:, :2].astype(np.int32)
    kept = np.broadcast_to(KEPT, several.shape)
    problem = Problem(several[:, 0], several, kept, *(x.astype(dtype) for x in (teacher, head)))
    inputs = h.astype(dtype), w.astype(dtype)

    def value_and_gradient(function, *arguments):
        value, gradients = jax.jit(jax.value_and_grad(lambda *some: function(*some).mean(), (1, 2)))(*arguments)
        return [np.asarray(x, np.float64) for x in (value, *gradients)]

    with jax.default_matmul_precision("highest" if dtype == np.float32 else None):
        got = value_and_gradient(loss, problem, *inputs)
    with on_host():
        wide = Problem(*(x.astype(np.int64 if x.dtype.kind == "i" else np.float64) for x in problem))
        inputs = (x.astype(np.float64) for x in inputs)
        exact = value_and_gradient(lambda a, h, w: dense(a, h @ w.T), wide, *inputs)
    line = {"function": name, "library": "jce", "dtype": np.dtype(dtype).name, "shape": [tokens, width, n]}
    lost = [np.nan_to_num(np.abs(x - e), nan=np.inf).max() / np.abs(e).max() for x, e in zip(got, exact, strict=True)]
    names = ("value", "∂hidden", "∂head")
    return [line | {"quantity": x, "error": float(f"{error:.3g}")} for x, error in zip(names, lost, strict=True)]
