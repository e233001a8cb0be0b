"""Checks labels and their probabilities against the hidden states of the same tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.linear import Linear
from jce._jax.arguments import as_array, described, float_dtype
from jce._jax.labels import wide_enough


def checked_labels(name: str, labels: ArrayLike, linear: Linear, several: bool = False) -> Array:
    """Labels in the shape of hidden without its last axis. With `several`, they may have a last axis of k labels."""
    got = {"labels": as_array(name, "labels", labels), "hidden": as_array(name, "hidden", linear.hidden)}
    y, h = got.values()
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"{name}: labels must be integers, a class index for each token; got {described(got)}. The target comes"
            f" first, then hidden and head."
        )
    batch = h.shape[:-1]
    # If hidden has no axes, checked_linear raises the error.
    if h.ndim and y.shape != batch and not (several and y.ndim == h.ndim and y.shape[:-1] == batch):
        or_more = ", or these axes and a last axis for k labels per token" if several else ""
        raise ValueError(
            f"{name}: labels must have the shape of hidden without its last axis, {batch}{or_more};"
            f" got {described(got)}. The target comes first, then hidden and head."
        )
    return wide_enough(y)


def checked_label_probs(name: str, labels: ArrayLike, label_probs: ArrayLike, linear: Linear) -> tuple[Array, Array]:
    """k labels per token, and their probabilities."""
    y, p = as_array(name, "labels", labels), as_array(name, "label_probs", label_probs)
    got = {"labels": y, "label_probs": p, "hidden": as_array(name, "hidden", linear.hidden)}
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"{name}: labels must be integers, k class indices for each token; got {described(got)}. For a probability"
            f" per class, use jce.linear_map with jce.cross_entropy_with_logits."
        )
    batch = got["hidden"].shape[:-1]
    if y.ndim == 0 or y.shape[:-1] != batch or p.shape != y.shape:
        raise ValueError(
            f"{name}: labels and label_probs must both have the shape of hidden, with k labels per token in place of"
            f" its last axis, {batch} + (k,); got {described(got)}. Without label_probs, pass one label per token."
            f" If label_probs has a probability for every class, use jce.linear_map("
            f'jce.cross_entropy_with_logits, label_probs, jce.Linear(hidden, head), reduction="mean").'
        )
    float_dtype(name, {"label_probs": p})
    return wide_enough(y), p
