"""Numbers of a few classes, each in its class's place.

Scattered on a CPU, which is slow at comparing each class with each label; compared on an accelerator, which is slow at
scattering.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import Array

from jce._classes import Classes
from jce._platforms import on_cpu

FEW = 16  # labels, which an accelerator compares with each class; more are scattered


def over_classes(y: Array, a: Array, x: Array, classes: Classes) -> Array:
    """Σⱼ aⱼ [i = yⱼ] for each class i of x."""
    compared, scattered = (functools.partial(f, classes=classes) for f in (_compared, _scattered))
    any_way = scattered if y.shape[-1] > FEW else on_cpu(scattered, compared)
    function = compared if classes.are_split(x) else any_way
    return function(classes.local(y, x), a, jnp.zeros_like(x))


def _compared(y, a, zeros, classes):
    for j in range(y.shape[-1]):
        zeros += jnp.where(classes.is_at(zeros, y[..., j]), classes.column(a[..., j]), jnp.zeros_like(zeros))
    return zeros


def _scattered(y, a, zeros, classes):
    rows, n = math.prod(zeros.shape[:-1]), zeros.shape[-1]
    y = jnp.where(classes.has(zeros, y), y, jnp.full_like(y, n))  # a negative index would count
    y, a = (b.reshape(rows, b.shape[-1]) for b in (y, a))
    return zeros.reshape(rows, n).at[jnp.arange(rows)[:, None], y].add(a, mode="drop").reshape(zeros.shape)
