"""Cross-entropy for heads with sparse targets: a few labels per token, each with a probability."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.loss.chunk import ChunkFunction
from jce._heads.loss.temperature import at_temperature, whole_log_sum
from jce._jax.arguments import float_dtype, is_array
from jce._jax.classes import Classes
from jce._numerics.mul0 import mul0, over
from jce._quantities.soft_targets import scaled_square
from jce._quantities.sparse_targets import rest_of, rounding, sparse_cross_entropy
from jce._softmax.over_classes import without_classes
from jce._softmax.softmax import logsumexp


def sparse_labels_loss(
    name: str, known: Mapping[str, float], tail: bool, logits, others, _, class_axis: Hashable | None
) -> ChunkFunction:
    """The loss of a chunk. `known` has the numbers that aren't traced."""
    classes = Classes(-1, class_axis)
    dtype = float_dtype(name, {"label_probs": others[1], "logits": logits[0]})
    rounded = rounding(others[1], dtype) if tail else None

    def loss(logits, others, traced, _):
        (of_head,), (y, p, *temperature) = logits, others
        p, of_head = p.astype(dtype), of_head.astype(dtype)
        t = temperature[0] if temperature else None
        x = at_temperature(of_head, t, classes)
        smoothing, z_loss = ((known | traced)[key] for key in ("smoothing", "z_loss"))
        smoothing, z_loss = (a.astype(dtype) if is_array(a) else a for a in (smoothing, z_loss))
        total = sparse_cross_entropy(y, p, x, jnp.ones_like(x), smoothing, rounded, classes)
        if tail and t is not None:
            total += _greedy_tail(y, p, of_head, t, rounded, classes)
        if is_array(z_loss) or z_loss:
            total += scaled_square(z_loss, whole_log_sum(logsumexp(x, classes), of_head, t, classes))
        return [total]

    return ChunkFunction(loss, jax.ShapeDtypeStruct((), dtype))


def _greedy_tail(y, p, x, t, rounded, classes):
    """(1-Σp)(m - m')/T at T = 0, and 0 at any other T. Here m is the maximum of all logits, and m' is the maximum over
    the classes without a label.

    If m' < m, the classes without a label have probability 0 at T = 0, and the logarithm of this 0 has no derivative.
    But the loss has a derivative with respect to T: it falls from +∞ as T grows.
    """
    m, m_rest = (lax.stop_gradient(classes.max(z)) for z in (x, without_classes(y, x, classes)))
    costs = (t == 0) & (m_rest > -jnp.inf) & (jnp.abs(rest_of(p)) > rounded)
    return mul0(over(jnp.where(costs, m - m_rest, jnp.zeros_like(m)), t.astype(m.dtype)), rest_of(p))


def are_classes(others: list[Array], n: int) -> Array:
    y, p, *_ = others
    return (((y >= 0) & (y < n)) | (p == 0)).all(-1)
