"""Platforms, for functions that differ between them: functions of rows (`_softmax`) and of chunks (`_heads/loop`).

The platform is known when a program is lowered, not when it is traced. There are two ways to get it. A function of rows
waits for the platform (`waiting.py`), and is traced at lowering, for that platform alone. A loop over tokens uses
`on_platform`: all versions are traced, and each platform lowers its own. If a loop waited, its value and its tangent
would be two loops, which XLA doesn't merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import lax


class Platform(NamedTuple):
    """A platform: CPU, TPU or GPU.

    `masks_labels` says whether it is faster to look up a label by a mask, in a sum over its row, than by a gather.
    `fuses_operands` says whether XLA computes an elementwise operand of a matmul inside the matmul, instead of storing
    it first.
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
    """The platform that JAX calls by this name."""
    return CPU if platform == "cpu" else TPU if platform == "tpu" else GPU


def on_platform(function: Callable, key: Callable, *arguments):
    """function(platform, *arguments) for the platform for which the program is lowered. Platforms with equal keys share
    a trace."""

    def on(platform):
        return lambda *arguments: function(platform, *arguments)

    tpu = {} if key(TPU) == key(GPU) else {"tpu": on(TPU)}
    return lax.platform_dependent(*arguments, cpu=on(CPU), default=on(GPU), **tpu)
