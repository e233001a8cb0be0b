"""Puts numbers, or -∞, into a row at the places of a few classes.

A CPU scatters them, since comparing each class with each label is slow there. An accelerator compares, since scattering
is slow there. So both functions wait until the platform is known (`waiting.py`). This also hides them from checkify,
which would report an IndexError of its own for a batch of scatters (JAX 0.8 to 0.12).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jce._jax.classes import Classes
from jce._jax.platforms import named
from jce._jax.waiting import Program, waiting

FEW = 16  # an accelerator compares each class with up to 16 labels; more labels are scattered there too


def over_classes(y: Array, a: Array, x: Array, classes: Classes) -> Array:
    """Σⱼ aⱼ [i = yⱼ] for each class i of x, at labels [..., k]."""
    return waiting(Program(_either, (_added, _scattered, classes)), classes.local(y, x), jnp.zeros_like(x), a)


def without_classes(y: Array, x: Array, classes: Classes) -> Array:
    """x, with -∞ at the labels [..., k]."""
    return waiting(Program(_either, (_masked, _struck, classes)), classes.local(y, x), x)


def _either(compared, scattered, classes, platform, y, x, *a):
    scatter = named(platform).is_cpu or y.shape[-1] > FEW
    return (scattered if scatter and not classes.are_split(x) else compared)(y, x, *a, classes)


def _added(y, zeros, a, classes):
    for j in range(y.shape[-1]):
        zeros += jnp.where(classes.is_at(zeros, y[..., j]), classes.column(a[..., j]), jnp.zeros_like(zeros))
    return zeros


def _masked(y, x, classes):
    for j in range(y.shape[-1]):
        x = jnp.where(classes.is_at(x, y[..., j]), jnp.full_like(x, -jnp.inf), x)
    return x


def _scattered(y, zeros, a, classes):
    rows, n = math.prod(zeros.shape[:-1]), zeros.shape[-1]
    y, a = (b.reshape(rows, b.shape[-1]) for b in (_none_below(y, zeros, classes), a))
    return zeros.reshape(rows, n).at[jnp.arange(rows)[:, None], y].add(a, mode="drop").reshape(zeros.shape)


def _struck(y, x, classes):
    put = functools.reduce(lambda f, _: jax.vmap(f), x.shape[:-1], lambda x, y: x.at[y].set(-jnp.inf, mode="drop"))
    return put(x, _none_below(y, x, classes))


def _none_below(y, x, classes):
    """Labels, with n in place of those out of range here: a negative index would count from the end."""
    return jnp.where(classes.has(x, y), y, jnp.full_like(y, x.shape[-1]))
