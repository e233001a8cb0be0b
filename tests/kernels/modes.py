"""Helpers that call a row's function: ordinary arguments, sums, gradients, and every mode of differentiation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import jax
import numpy as np

from tests.kernels.kernel import Kernel


def easy(kernel: Kernel, rng: np.random.Generator, shape: tuple[int, ...], dtype=np.float32) -> list[np.ndarray]:
    """Arguments without edge cases."""
    return next(iter(kernel.sample(rng, shape, dtype).values()))


def total(kernel: Kernel) -> Callable:
    return lambda *arguments: kernel.function(*arguments).sum()


@functools.cache
def gradient(kernel: Kernel) -> Callable:
    """The gradients with respect to all arguments, as a tuple, compiled as one program."""
    return jax.jit(jax.grad(total(kernel), tuple(range(len(kernel.arguments)))))


def modes(function: Callable, positions: tuple[int, ...]) -> dict[str, Callable]:
    """Derivatives of a function that returns one number, as functions of (arguments, directions), up to third order."""

    def pushed(f):
        return lambda a, t: jax.jvp(lambda *a: f(*a), a, t)[1]

    def inner(u, v):
        return sum((x * y).sum() for x, y in zip(u, v, strict=True))

    gradient = jax.grad(function, positions)
    return {
        "value": lambda a, t: function(*a),
        "gradient": lambda a, t: jax.value_and_grad(function, positions)(*a),
        "jvp": lambda a, t: jax.jvp(function, a, t),
        "linearize": lambda a, t: jax.linearize(function, *a)[1](*t),
        "forward over reverse": lambda a, t: pushed(gradient)(a, t),
        "reverse over forward": lambda a, t: jax.grad(lambda a: pushed(function)(a, t))(a),
        "reverse over reverse": lambda a, t: jax.grad(lambda a: inner(gradient(*a), t))(a),
        "third order": lambda a, t: jax.grad(lambda a: pushed(lambda *a: pushed(function)(a, t))(a, t))(a),
    }


MODES = tuple(modes(lambda x: x, (0,)))


def op_by_op():
    """A context without jit. Under jax_debug_nans it keeps jit, or a NaN that a select discards would raise too."""
    return contextlib.nullcontext() if jax.config.jax_debug_nans else jax.disable_jit()
