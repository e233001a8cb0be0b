"""Canonicalizes labels (one per row, or several with probabilities) and their logits."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import as_array, as_floats, described
from jce._jax.classes import Classes
from jce._jax.layout import Layout
from jce._jax.rows import distributions


def labelled(
    function: str,
    axis: int,
    where: ArrayLike | None,
    axis_name: Hashable | None,
    labels: ArrayLike,
    logits: ArrayLike,
    several: str = "pass label_probs",
) -> tuple[Array, Array, Array, Classes]:
    """Returns labels in the shape of the batch, logits as in `distributions`, `kept`, and the `Classes`. `kept` is 1 at
    each class that `where` keeps, and 0 at the others. `several` is the advice of an error, for k labels per row."""
    got = {"labels": labels, "logits": logits}
    y = _integer_labels(function, got)
    x, kept, classes, rows = _logits_of_labels(function, axis, where, axis_name, logits)
    if y.shape != rows.shape:
        raise ValueError(
            f"{function}: labels must have the shape of logits without the class axis, {rows.shape}; got"
            f" {described(got)}. The order is labels, logits. For the same label in every row, broadcast"
            f" it or use jax.vmap. For k labels per row, {several}."
        )
    y = rows.broadcast(y)
    if where is not None or jnp.asarray(logits).shape[classes.axis] == 0:
        # If all classes of a row are masked, its loss is 0 for any label. So its label becomes 0: the first class has
        # the probability 1 there (`rows.distributions`). Another label would make the loss +∞ or NaN.
        y = jnp.where(classes.any(kept != 0), y, jnp.zeros_like(y))
    return y, x, kept, classes


def labelled_with_probs(
    function: str,
    axis: int,
    where: ArrayLike | None,
    axis_name: Hashable | None,
    labels: ArrayLike,
    label_probs: ArrayLike,
    logits: ArrayLike,
) -> tuple[Array, Array, Array, Array, Classes]:
    """Returns labels and their probabilities, [..., k]. And, as in `labelled` but with the class axis last: logits,
    `kept`, and the `Classes`."""
    got = {"labels": labels, "label_probs": label_probs, "logits": logits}
    y = _integer_labels(function, got)
    p, x = as_floats(function, {name: got[name] for name in ("label_probs", "logits")})
    x, kept, classes, rows = _logits_of_labels(function, axis, where, axis_name, x)
    if y.ndim == 0 or y.shape[:-1] != rows.shape or p.shape != y.shape:
        raise ValueError(
            f"{function}: labels and label_probs must both have the shape of logits without the class axis, and then a"
            f" last axis for k labels per row: {rows.shape} + (k,); got {described(got)}. If label_probs has a"
            f" probability for every class, use cross_entropy_with_logits(label_probs, logits)."
        )
    few = Layout(y.shape, rows.mesh, (*rows.spec, None))
    y, p = few.broadcast(y), few.broadcast(p)
    if where is not None or jnp.asarray(logits).shape[classes.axis] == 0:
        # If all classes of a row are masked, its loss is 0 for any labels. So the label probabilities become 0: the
        # first class has the probability 1 there (`rows.distributions`), and any other label would make the loss +∞.
        p = jnp.where(jnp.expand_dims(classes.any(kept != 0), -1), p, jnp.zeros_like(p))
    x, kept = (jnp.moveaxis(a, classes.axis, -1) for a in (x, kept))
    return y, p, x, kept, Classes(-1, classes.mesh_axis)


def labelled_several(
    function: str, axis: int, where: ArrayLike | None, axis_name: Hashable | None, labels: ArrayLike, logits: ArrayLike
) -> tuple[Array, Array, Array | None, Classes]:
    """Returns labels [..., k], logits with the class axis last, an array that says which rows have an unmasked class
    (None if all have one), and the `Classes`."""
    got = {"labels": labels, "logits": logits}
    y = _integer_labels(function, got)
    x, kept, classes, rows = _logits_of_labels(function, axis, where, axis_name, logits)
    if y.ndim == 0 or y.shape[:-1] != rows.shape:
        raise ValueError(
            f"{function}: labels must have the shape of logits without the class axis, {rows.shape}, and then a last"
            f" axis for k labels per row (optional without a tail); got {described(got)}. For one label per row with a"
            f" tail, pass labels[..., None]."
        )
    y = Layout(y.shape, rows.mesh, (*rows.spec, None)).broadcast(y)
    all_kept = where is None and jnp.asarray(logits).shape[classes.axis] > 0
    any_kept = None if all_kept else jnp.expand_dims(classes.any(kept != 0), -1)
    return y, jnp.moveaxis(x, classes.axis, -1), any_kept, Classes(-1, classes.mesh_axis)


def _integer_labels(function: str, got: Mapping[str, ArrayLike]) -> Array:
    y = as_array(function, "labels", got["labels"])
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must be integers, a class index for each row; got {described(got)}. The order is"
            f" labels, logits. If the target is a probability per class, use cross_entropy_with_logits."
        )
    return wide_enough(y)


def _logits_of_labels(function, axis, where, axis_name, logits) -> tuple[Array, Array, Classes, Layout]:
    """Logits, `kept` and the `Classes` as in `labelled`, and the layout for one number per row."""
    (x,), classes = distributions(function, axis, where, axis_name, in_logits=("logits",), logits=logits)
    logits, mask = jnp.asarray(logits), jnp.asarray(True if where is None else where)
    layout = Layout.of(logits.shape, [logits, mask])  # as in `distributions`
    kept = layout.broadcast(mask).astype(x.dtype) if logits.shape[classes.axis] else jnp.zeros_like(x)
    return x, kept, classes, layout.without(classes.axis)


def require_no_tail(function: str, tail: bool) -> None:
    if tail:
        raise ValueError(
            f"{function}: tail must come with label_probs, the probabilities of labels; got tail={tail!r} alone."
            f" Without label_probs, the label has all of the probability, and a tail would have none."
        )


def wide_enough(labels: Array) -> Array:
    """The labels, cast to int32 if their dtype has one or two bytes, which might not hold the number of classes."""
    return labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)
