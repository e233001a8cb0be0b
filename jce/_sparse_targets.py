"""Targets of few classes: labels with a probability each, as of a teacher whose likeliest classes are kept.

H(p, q) is that of soft targets, 0 at all classes without a label. The rest of a truncated teacher may count as one more
outcome, the tail: it has 1 - Σp of the target, and of the model 1 - Σq, the classes without a label. With S the sum of
exp xᵢ over those with one and R that over the others, log 1/(1 - Σq) = log(1 + S/R), of which nothing cancels.

1 - Σp of a list that holds every possible class is what rounding left of 0. Times an infinite log 1/(1 - Σq), or one
that grows without bound, it would be everything: so within the rounding of p it counts as 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jce._binary_with_logits import binary_cross_entropy_with_logits
from jce._classes import Classes
from jce._elementary import two_sum
from jce._mul0 import mul0
from jce._soft_targets import smoothed, soft
from jce._softmax import logsumexp
from jce._ways.over_classes import over_classes

ROUNDINGS = 4  # that leave Σp off 1: of softmaxes of up to 10,000 classes it was at most 3.3 eps


def rounding(label_probs: Array, dtype) -> float:
    """How far off 1 rounding may leave the sum of probabilities, as they were given."""
    given = label_probs.dtype if jnp.issubdtype(label_probs.dtype, jnp.floating) else dtype
    return ROUNDINGS * float(jnp.finfo(given).eps)


def sparse_cross_entropy(
    y: Array, p: Array, x: Array, kept: Array, smoothing: float | Array, tail: float | None, classes: Classes
) -> Array:
    """Of labels and probabilities [..., k] and logits [..., n]; `kept` is 1 for each class that counts.

    With a tail, which is said by the rounding of p.
    """
    is_class = (y >= 0) & (y < classes.count(x))
    # A label that is no class makes its row NaN, as a logit that is NaN does, and is NaN in its probability.
    wrong = ~is_class & (p != 0)
    x += classes.column(jnp.where(wrong.any(-1), jnp.nan, 0).astype(x.dtype))
    used = jnp.where(is_class, p, jnp.zeros_like(p))
    total = used.sum(-1)
    loss = soft(over_classes(y, used, x, classes), x, classes)
    if not isinstance(smoothing, float) or smoothing:
        uniform = kept / jnp.maximum(classes.column(classes.sum(kept)), 1)
        loss = smoothed(loss, mul0(soft(uniform, x, classes), total), smoothing)
    if tail is not None:
        rest = _rest(used)
        nothing = jnp.abs(rest) <= tail
        # In p the derivative stays, since Σp may grow: so it is the value that is lifted.
        rest += lax.stop_gradient(jnp.where(nothing, jnp.maximum(-rest, 0), jnp.zeros_like(rest)))
        loss += mul0(_log_over_others(y, is_class, x, kept, nothing, classes), rest)
    nan = jnp.where(wrong, jnp.nan, 0).astype(p.dtype)  # there alone, for jax_debug_nans
    return loss + jnp.where(wrong, mul0(nan, p), jnp.zeros_like(p)).sum(-1)


def _rest(p):
    """1 - Σp, with its digits where little is left: what each addition loses is added in the end."""
    terms = jnp.concatenate([jnp.ones_like(p.sum(-1, keepdims=True)), -p], -1)
    lost = jnp.zeros_like(terms)
    while terms.shape[-1] > 1:
        odd = [(0, 0)] * (terms.ndim - 1) + [(0, terms.shape[-1] % 2)]
        pairs = [jnp.pad(a, odd).reshape(*a.shape[:-1], (a.shape[-1] + 1) // 2, 2) for a in (terms, lost)]
        (terms, more), lost = two_sum(pairs[0][..., 0], pairs[0][..., 1]), pairs[1].sum(-1)
        lost += lax.stop_gradient(more)
    return (terms + lost)[..., 0]


def _log_over_others(y, is_class, x, kept, nothing, classes):
    """log 1/(1 - Σq), and 0 where every class has a label, or every possible one and nothing of the target is left."""
    listed = over_classes(y, is_class.astype(x.dtype), x, classes) > 0
    x = x - classes.column(lax.stop_gradient(classes.max(x)))  # so that sums are as exact as differences
    s, some = _log_sum(x, listed, classes)
    r, others = _log_sum(x, ~listed, classes)
    d = jnp.where(some & others, s - r, jnp.where(others, jnp.full_like(s, -jnp.inf), jnp.full_like(s, jnp.inf)))
    d = jnp.where(classes.any(~listed & (kept != 0)) & (others | ~nothing), d, jnp.full_like(d, -jnp.inf))
    return binary_cross_entropy_with_logits(jnp.zeros_like(d), d)


def _log_sum(x, there, classes):
    """log Σ exp xᵢ over some classes, and whether one of them is possible; if none is, any number."""
    possible = classes.any(there & (x > -jnp.inf))
    x = jnp.where(there, x, jnp.full_like(x, -jnp.inf))
    return logsumexp(jnp.where(classes.column(possible), x, jnp.zeros_like(x)), classes), possible
