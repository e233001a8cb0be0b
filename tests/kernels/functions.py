"""Public functions with some arguments and options fixed, as functions of the other arguments."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import jce
from tests.kernels.formulas import BETA, Z_LOSS

# The label functions as functions of the logits alone, with label 0


def label_0(**options):
    @functools.wraps(jce.cross_entropy_with_integer_labels)
    def function(logits, *, axis=-1, **others):
        shape = list(np.shape(logits))
        if isinstance(axis, int) and -len(shape) <= axis < len(shape):
            del shape[axis]
        zeros = np.zeros if all(isinstance(k, int) for k in shape) else jnp.zeros  # an exported shape may be symbolic
        return jce.cross_entropy_with_integer_labels(zeros(shape, int), logits, axis=axis, **options, **others)

    return function


def log_prob(entry, *labels, **options):
    """One entry of the log-probabilities of these labels. All distributions have the same labels."""

    @functools.wraps(jce.log_probs_with_integer_labels)
    def function(logits, *, axis=-1, **others):
        shape = list(np.shape(logits))
        if isinstance(axis, int) and -len(shape) <= axis < len(shape):
            del shape[axis]
        of_each = jnp.broadcast_to(jnp.array(labels), (*shape, len(labels)))
        return jce.log_probs_with_integer_labels(of_each, logits, axis=axis, **options, **others)[..., entry]

    return function


def at_beta(function):
    """The function with a `beta` that gives p and q different weights."""

    @functools.wraps(function)
    def weighing(p, q, **options):
        return function(p, q, beta=BETA, **options)

    return weighing


def penalized(function):
    """The function with a z-loss."""

    @functools.wraps(function)
    def with_penalty(p, logits, **options):
        return function(p, logits, z_loss=Z_LOSS, **options)

    return with_penalty


# The `linear_*` functions as functions of the logits: the head is zero, and the logits are its bias


def of_rows(of_row, function):
    @functools.wraps(function)
    def of_logits(*logits):
        *shape, n = np.shape(logits[0])
        rows = [jnp.reshape(x, (math.prod(shape), n)) for x in logits]
        return jax.vmap(of_row)(*rows).reshape(shape)

    return of_logits


def linear(row) -> jce.Linear:
    return jce.Linear(jnp.zeros(1, row.dtype), jnp.zeros((row.size, 1), row.dtype), row)


def with_label_0(function, statistic=lambda result: result, **options):
    def of_row(row):
        x = linear(row)
        return statistic(function(np.zeros((), int), x.hidden, x.head, x.bias, **options))

    return of_rows(of_row, function)


def mapped(function, **options):
    return of_rows(lambda row: jce.linear_map(function, linear(row), reduction="sum", **options), jce.linear_map)
