"""A head's cross-entropy with targets of few classes: labels with a probability each."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._heads.linear import Linear
from jce._heads.numbers import Numbers
from jce._heads.over_tokens import OfChunk, TokenOptions, over_tokens
from jce._heads.temperature import at_temperature, checked_temperature, whole_log_sum
from jce._jax.arguments import as_array, described, float_dtype, is_array
from jce._jax.classes import Classes
from jce._jax.labels import wide_enough
from jce._numerics.mul0 import mul0, over
from jce._quantities.soft_targets import scaled_square
from jce._quantities.sparse_targets import rest_of, rounding, sparse_cross_entropy
from jce._softmax.over_classes import without_classes
from jce._softmax.softmax import logsumexp


def linear_sparse_cross_entropy(
    name: str,
    labels: ArrayLike,
    label_probs: ArrayLike,
    linear: Linear,
    tail: bool,
    given: Numbers,
    options: TokenOptions,
) -> Array:
    """`linear_cross_entropy` with k labels for each token, and their probabilities."""
    y, p = as_array(name, "labels", labels), as_array(name, "label_probs", label_probs)
    batch = jnp.shape(linear.hidden)[:-1]
    _require_shapes(name, batch, {"labels": y, "label_probs": p, "hidden": linear.hidden})
    known, traced = given.checked(name)
    arguments = {"labels": wide_enough(y), "label_probs": p, "logits": linear}
    for key, t in checked_temperature(name, given.temperature, batch).items():
        arguments[key] = jnp.broadcast_to(t, batch)
    make = functools.partial(_of_chunk, name, known, tail)
    return over_tokens(name, make, arguments, options, traced, is_defined=_are_classes)


def _require_shapes(name: str, batch: tuple[int, ...], got: Mapping[str, Any]) -> None:
    y, p = got["labels"], got["label_probs"]
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, k class indices for each token; got {described(got)}.")
    if y.ndim == 0 or y.shape[:-1] != batch or p.shape != y.shape:
        raise ValueError(
            f"{name}: labels and label_probs must both have the shape of hidden without its last axis, and an axis for"
            f" the labels of each token last, {batch} and k; got {described(got)}. Without label_probs there is one"
            f" label a token. If label_probs has a probability for every class, use jce.linear_map("
            f'jce.cross_entropy_with_logits, label_probs, jce.Linear(hidden, head), reduction="mean").'
        )
    float_dtype(name, {"label_probs": p})


def _of_chunk(name: str, known: Mapping[str, float], tail: bool, one, _, class_axis: Hashable | None) -> OfChunk:
    """The loss of a chunk, where `known` has the numbers that aren't traced."""
    classes = Classes(-1, class_axis)
    dtype = float_dtype(name, {"label_probs": one[1], "logits": one[2]})
    rounded = rounding(one[1], dtype) if tail else None

    def loss(chunk, shared, *_):
        y, p, of_head, *temperature = chunk
        p, of_head = p.astype(dtype), of_head.astype(dtype)
        t = temperature[0] if temperature else None
        x = at_temperature(of_head, t, classes)
        smoothing, z_loss = ((known | shared)[key] for key in ("smoothing", "z_loss"))
        smoothing, z_loss = (a.astype(dtype) if is_array(a) else a for a in (smoothing, z_loss))
        total = sparse_cross_entropy(y, p, x, jnp.ones_like(x), smoothing, rounded, classes)
        if tail and t is not None:
            total += _greedy_tail(y, p, of_head, t, rounded, classes)
        if is_array(z_loss) or z_loss:
            total += scaled_square(z_loss, whole_log_sum(logsumexp(x, classes), of_head, t, classes))
        return [total]

    return OfChunk(loss, jnp.zeros((), dtype))


def _greedy_tail(y, p, x, t, rounded, classes):
    """(1-Σp)(m - m')/T at T = 0, where m' is the maximum over the classes without a label; 0 at any other T.

    If m' < m, these classes have probability 0 at T = 0. A logarithm of 0 has no derivative, but the loss has one in T:
    it falls from +∞ as T grows.
    """
    m, m_rest = (lax.stop_gradient(classes.max(z)) for z in (x, without_classes(y, x, classes)))
    costs = (t == 0) & (m_rest > -jnp.inf) & (jnp.abs(rest_of(p)) > rounded)
    return mul0(over(jnp.where(costs, m - m_rest, jnp.zeros_like(m)), t.astype(m.dtype)), rest_of(p))


def _are_classes(targets: list[Array], n: int) -> Array:
    y, p, *_ = targets
    return (((y >= 0) & (y < n)) | (p == 0)).all(-1)
