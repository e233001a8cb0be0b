"""Division of a head's logits by a temperature: one number, or one per token. The Python number 1 costs nothing."""

from __future__ import annotations

from jax import Array, lax

from jce._jax.classes import Classes
from jce._numerics.mul0 import over
from jce._softmax.compare import tempered


def at_temperature(x: Array, t: Array | None, classes: Classes) -> Array:
    """x/t for logits x, up to a constant per row: (x - max x)/t."""
    return x if t is None else tempered(x, t.astype(x.dtype), classes)


def whole_log_sum(log_sum: Array, x: Array, t: Array | None, classes: Classes) -> Array:
    """log Σ exp(x/t), where `log_sum` is the logsumexp of the result of `at_temperature`: x/t up to a constant."""
    return log_sum if t is None else log_sum + over(classes.max(lax.stop_gradient(x)), t.astype(x.dtype))
