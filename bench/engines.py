"""Three ways to run a function: JAX under jit, PyTorch, and NumPy, which computes values only.

The program for a function f and a mode takes the arguments of f. For the Hessian-vector product, it also takes a
direction for each argument that is differentiated. Derivatives are those of Σ f.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np

VALUE, GRADIENT, HVP = "value", "value and gradient", "Hessian-vector product"
ALONE = "gradient"
MODES = (VALUE, GRADIENT, HVP)


def optional(name: str) -> ModuleType | None:
    """The module, or None if it isn't installed or can't be imported together with the others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception:  # a library that fails to import, for whatever reason, is skipped
        return None


torch = optional("torch")


class Jax:
    name = "jax"

    def on(self, platform: str) -> bool:
        return True

    def put(self, x: np.ndarray):
        return jax.device_put(x)

    def wait(self, result) -> None:
        jax.block_until_ready(result)

    def program(self, f: Callable, mode: str, positions: tuple[int, ...]) -> Callable:
        def total(*arguments):
            return f(*arguments).sum()

        def hvp(*arrays):
            arguments, directions = list(arrays[: -len(positions)]), arrays[-len(positions) :]

            def gradient(*some):
                for i, x in zip(positions, some, strict=True):
                    arguments[i] = x
                return jax.grad(total, positions)(*arguments)

            return jax.jvp(gradient, tuple(arguments[i] for i in positions), directions)[1]

        gradients = {GRADIENT: jax.value_and_grad(total, positions), ALONE: jax.grad(total, positions)}
        return jax.jit(({VALUE: f, HVP: hvp} | gradients)[mode])


class Torch:
    name = "torch"

    def on(self, platform: str) -> bool:
        return platform == "cpu"  # the extra `bench` installs the CPU build

    def put(self, x: np.ndarray):
        return torch.from_numpy(np.array(x)) if x.dtype.kind == "f" else torch.from_numpy(np.array(x, np.int64))

    def wait(self, result) -> None:
        """PyTorch's calls return when they are done."""

    def program(self, f: Callable, mode: str, positions: tuple[int, ...]) -> Callable:
        def value(*arguments):
            with torch.no_grad():
                return f(*arguments)

        def traced(arguments):
            arguments = list(arguments)
            for i in positions:
                arguments[i] = arguments[i].detach().requires_grad_()
            return f(*arguments).sum(), [arguments[i] for i in positions]

        def gradient(*arguments):
            total, some = traced(arguments)
            return total.detach(), torch.autograd.grad(total, some)

        def hvp(*arrays):
            total, some = traced(arrays[: -len(positions)])
            directions = arrays[-len(positions) :]
            gradients = torch.autograd.grad(total, some, create_graph=True)
            inner = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
            return torch.autograd.grad(inner, some, allow_unused=True, materialize_grads=True)

        return {VALUE: value, GRADIENT: gradient, HVP: hvp}[mode]


class NumPy:
    name = "numpy"

    def on(self, platform: str) -> bool:
        return platform == "cpu"

    def put(self, x: np.ndarray):
        return x

    def wait(self, result) -> None:
        """NumPy's calls return when they are done."""

    def program(self, f: Callable, mode: str, positions: tuple[int, ...]) -> Callable:
        if mode != VALUE:
            raise NotImplementedError("NumPy has no derivatives")
        return f


def fetched(result):
    """The result as NumPy arrays."""
    return jax.tree.map(np.asarray, result)
