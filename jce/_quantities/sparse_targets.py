"""Sparse targets: k labels with a probability each, such as the top-k classes of a teacher.

H(p, q) is the cross-entropy for a soft target that is 0 at all classes without a label. The remaining probability of a
truncated teacher may count as one more outcome, the tail. Its probability is 1 - Σp in the target, and 1 - Σq in the
model. log(1 - Σq) is computed from the classes without a label, so nothing cancels.

If the labels cover every possible class, 1 - Σp is 0 up to rounding, while log 1/(1 - Σq) is infinite or grows without
bound. Their product would dominate the loss, so if 1 - Σp is within the rounding of p, it counts as 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jce._jax.classes import Classes
from jce._numerics.elementary import two_sum
from jce._numerics.mul0 import mul0
from jce._quantities.label_log_probs import at_labels, is_class, log_probs_and_tail
from jce._quantities.soft_targets import smoothed_by, soft, surprisal_terms
from jce._softmax.over_classes import over_classes

ROUNDINGS = 4  # eps by which a stored Σp may differ from 1: at most 3.3 in softmaxes of up to 10,000 classes


def rounding(label_probs: Array, dtype) -> float:
    """How far rounding may move Σp away from 1, in the dtype in which the probabilities were given."""
    given = label_probs.dtype if jnp.issubdtype(label_probs.dtype, jnp.floating) else dtype
    return ROUNDINGS * float(jnp.finfo(given).eps)


def sparse_cross_entropy(
    y: Array, p: Array, x: Array, kept: Array, smoothing: Array | None, tail: float | None, classes: Classes
) -> Array:
    """The loss for labels y with probabilities p [..., k] at logits x [..., n]. `kept` is 1 for unmasked classes.

    `tail` is None if there is no tail. Otherwise it says how far rounding may move Σp away from 1.
    """
    known = is_class(y, x, classes)
    # A label out of range makes the loss of its row NaN (by the NaN that is added to the logits here), and also the
    # derivative with respect to the label's probability (by the last line).
    wrong = ~known & (p != 0)
    x += classes.column(jnp.where(wrong.any(-1), jnp.nan, 0).astype(x.dtype))
    used = jnp.where(known, p, jnp.zeros_like(p))
    if tail is None:
        loss, of_tail = soft(over_classes(y, used, x, classes), x, classes), 0
    else:
        loss, of_tail = _with_tail(y, used, x, kept, tail, classes)
    if smoothing is not None:
        uniform = kept / jnp.maximum(classes.column(classes.sum(kept)), 1)
        loss = _smoothed(loss, mul0(soft(uniform, x, classes), used.sum(-1)), smoothing, y, used, uniform, x, classes)
    loss += of_tail
    nan = jnp.where(wrong, jnp.nan, 0).astype(p.dtype)  # jax_debug_nans would stop at a constant NaN
    return loss + jnp.where(wrong, mul0(nan, p), jnp.zeros_like(p)).sum(-1)


def _smoothed(loss, uniform_loss, smoothing, y, p, uniform, x, classes):
    # Both losses are computed without log Z Σp, which they have in common. With it, their difference would cancel, as
    # in `mean_excess`.
    m = lax.stop_gradient(classes.max(x))
    mean = mul0(classes.sum(surprisal_terms(uniform, m, x, classes)), p.sum(-1))
    return smoothed_by(loss, uniform_loss, mean - mul0(m[..., None] - at_labels(x, y, classes), p).sum(-1), smoothing)


def _with_tail(y, p, x, kept, tail, classes):
    """The loss of the labels, and the loss of the tail."""
    once, weights = _without_repetition(y, p, classes.count(x))
    log_q, log_rest = jnp.split(log_probs_and_tail(once, x, classes), [y.shape[-1]], -1)
    log_rest = log_rest.squeeze(-1)
    rest = rest_of(p)
    nothing = jnp.abs(rest) <= tail
    # If rounding made 1 - Σp negative, its value is raised to 0. Its derivative with respect to p stays -1.
    rest += lax.stop_gradient(jnp.where(nothing, jnp.maximum(-rest, 0), jnp.zeros_like(rest)))
    empty = (log_rest == -jnp.inf) & (nothing | ~_has_others(once, kept, classes))
    surprisal = jnp.where(empty, jnp.zeros_like(rest), -log_rest)
    return 0 - mul0(log_q, weights).sum(-1), mul0(surprisal, rest)


def rest_of(p):
    """1 - Σp, accurate even if Σp is near 1: pairwise sums, whose rounding errors are added at the end."""
    sums = jnp.concatenate([jnp.ones_like(p.sum(-1, keepdims=True)), -p], -1)
    lost = jnp.zeros_like(sums)
    while sums.shape[-1] > 1:
        odd = [(0, 0)] * (sums.ndim - 1) + [(0, sums.shape[-1] % 2)]
        pairs = [jnp.pad(a, odd).reshape(*a.shape[:-1], (a.shape[-1] + 1) // 2, 2) for a in (sums, lost)]
        (sums, more), lost = two_sum(pairs[0][..., 0], pairs[0][..., 1]), pairs[1].sum(-1)
        lost += lax.stop_gradient(more)
    return (sums + lost)[..., 0]


def _without_repetition(y, p, n):
    """Labels and probabilities, with repeated labels merged: the first of equal labels gets the sum of their
    probabilities. The others become n, which is out of range, with probability 0."""
    same = y[..., :, None] == y[..., None, :]
    j, earlier = (lax.broadcasted_iota(y.dtype, same.shape, axis) for axis in (y.ndim - 1, y.ndim))
    again = (same & (earlier < j)).any(-1)
    total = jnp.where(same, p[..., None, :], jnp.zeros_like(p)[..., None, :]).sum(-1)
    return jnp.where(again, jnp.full_like(y, n), y), jnp.where(again, jnp.zeros_like(p), total)


def _has_others(y, kept, classes):
    """Whether some kept class is without a label. The labels y are distinct."""
    found = at_labels(kept, y, classes)
    return classes.sum(kept) > jnp.where(is_class(y, kept, classes), found, jnp.zeros_like(found)).sum(-1)
