"""A kernel: a function of rows, traced when it is lowered, with the way of summing that suits the platform."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jce._jax.classes import Classes
from jce._jax.platforms import Platform, named
from jce._jax.waiting import Program, waiting
from jce._softmax.chain import Chain
from jce._softmax.passes import Passes
from jce._softmax.reduction import Reduction
from jce._softmax.way import Way


def way_of(classes: Classes, platform: Platform, x: Array) -> Way:
    """How the platform sums over the classes of arrays like x."""
    if platform.is_cpu:
        return Passes.of(classes, x)
    return (Chain if platform.chains and Chain.may_be(classes, x) else Reduction).of(classes, x)


def kernel(function: Callable, apart: bool = False, shares: bool = False) -> Callable:
    """Decorates function(*arrays and numbers per row, classes), which is called with a `Way` in place of the `Classes`.

    `apart`: XLA mustn't merge it with another kernel of the same arrays, where one program with two results would be
    slower. `shares`: its own results may share intermediate arrays, as in a kernel that compares two rows.
    """

    @functools.wraps(function)
    def on_each(*arguments):
        *arrays, classes = arguments
        if isinstance(classes, Way):
            return function(*arguments)
        return waiting(Program(_of_rows, (function, classes, apart, shares)), *arrays)

    return on_each


kernel_apart = functools.partial(kernel, apart=True)
kernel_sharing = functools.partial(kernel, shares=True)


def _of_rows(kernel, classes, apart, shares, platform, *arrays):
    x = max(jax.tree.leaves(arrays), key=jnp.ndim)
    way = way_of(classes, named(platform), x)
    arrays = jax.tree.map(lambda a: way.fold(a) if a.ndim == x.ndim else a, arrays)

    def function(*arrays):
        return kernel(*arrays, way)

    results = function(*arrays) if shares else way.results(function, arrays, x.ndim, apart)
    return jax.tree.map(lambda r: way.unfold(r) if r.ndim >= x.ndim else r, results)
