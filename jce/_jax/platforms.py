"""The kinds of device, and functions that differ between them: of rows (`_softmax`) and of chunks (`_heads/loop`).

The platform is known when a program is lowered, not when it is traced. There are two ways to ask for it. A function of
rows waits for it (`waiting.py`), and is traced at lowering, for that platform alone. A loop over tokens asks by
`on_platform`: all versions are traced, and each platform lowers its own. If a loop waited, its value and its tangent
would be two loops, which XLA doesn't merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import lax


class Platform(NamedTuple):
    """A kind of device.

    `masks_labels` says whether looking up a label by a mask, in a sum over its row, is faster than a gather.
    `fuses_operands` says whether XLA computes an elementwise operand of a matrix product inside the product, instead of
    storing it first.
    """

    name: str
    masks_labels: bool = False
    fuses_operands: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


CPU = Platform("cpu")
TPU = Platform("tpu", masks_labels=True, fuses_operands=True)
GPU = Platform("gpu")


def named(platform: str | None) -> Platform:
    """The platform of this name in JAX."""
    return CPU if platform == "cpu" else TPU if platform == "tpu" else GPU


def on_platform(function: Callable, key: Callable, *arguments):
    """function(platform, *arguments) for the platform that it is lowered for; traced once for those with equal keys."""

    def on(platform):
        return lambda *arguments: function(platform, *arguments)

    tpu = {} if key(TPU) == key(GPU) else {"tpu": on(TPU)}
    return lax.platform_dependent(*arguments, cpu=on(CPU), default=on(GPU), **tpu)
