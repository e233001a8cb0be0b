"""Kernels: functions of rows that are traced when a program is lowered, with the backend of the platform."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jce._jax.classes import Classes
from jce._jax.platforms import Platform, named
from jce._jax.waiting import Program, waiting
from jce._softmax.backend import Backend
from jce._softmax.chain import Chain
from jce._softmax.passes import Passes
from jce._softmax.reduction import MaskedReduction, Reduction


def backend_for(classes: Classes, platform: Platform, x: Array) -> Backend:
    """The platform's backend for the classes of arrays like x."""
    if platform.is_cpu:
        backend = Passes
    elif platform.masks_labels:
        backend = MaskedReduction
    else:
        backend = Chain if Chain.may_be(classes, x) else Reduction
    return backend.of(classes, x)


def kernel(function: Callable, stores_intermediates: bool = False) -> Callable:
    """Decorates function(*arrays and numbers per row, backend). Callers pass `Classes` in place of the `Backend`, since
    the platform isn't known yet. A kernel that calls another kernel passes its own backend.

    With `stores_intermediates`, all results are computed together, and may share arrays that are stored, as in a kernel
    that compares two rows. Without it, a backend may compute each result separately (`chain.py`).
    """

    @functools.wraps(function)
    def on_rows(*arguments):
        *arrays, classes = arguments
        if isinstance(classes, Backend):
            return function(*arguments)
        return waiting(Program(_of_rows, (function, classes, stores_intermediates)), *arrays)

    return on_rows


storing_kernel = functools.partial(kernel, stores_intermediates=True)


def _of_rows(kernel, classes, stores_intermediates, platform, *arrays):
    x = max(jax.tree.leaves(arrays), key=jnp.ndim)
    backend = backend_for(classes, named(platform), x)
    arrays = jax.tree.map(lambda a: backend.fold(a) if a.ndim == x.ndim else a, arrays)

    def function(*arrays):
        return kernel(*arrays, backend)

    results = function(*arrays) if stores_intermediates else backend.results(function, arrays, x.ndim)
    return jax.tree.map(lambda r: backend.unfold(r) if r.ndim >= x.ndim else r, results)
