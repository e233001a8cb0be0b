"""What differs between a CPU and an accelerator: how rows are summed, and in which order and size a head is computed.

The platform is known when a program is lowered, not when it is traced. What is computed of rows therefore waits
(`_waiting.py`). Of a loop over tokens both ways are traced, and each platform lowers its own: waiting, a loop's value
and its tangent would be two loops, which XLA doesn't merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import lax

from jce._layout import auto_devices


class ChunkSize(NamedTuple):
    """What a caller says of a loop's chunks: of how many tokens, or None for the rule; and whether each is filled up to
    just as many, however few tokens there are."""

    tokens: int | None
    filled: bool = False


class Chunks(NamedTuple):
    """A loop's: of how many tokens, on how many devices, which, whether the first comes before the loop, and
    whether each has just so many."""

    size: int
    devices: int
    apart: bool
    peeled: bool
    filled: bool


class Platform(NamedTuple):
    """How a chunk is summed and multiplied there, and how many tokens it has.

    As many as fill so many bytes with logits, but not fewer than `least_tokens`: with few, reading the head and adding
    to its gradient take longer than multiplying. `least_halved` are they where what is stored of the logits is half as
    large. So on each device, where XLA splits the tokens. Of fewer than `few` classes, whose steps cost more than what
    they save, they are 8 times as many. And whether it makes a chain of sums over short rows one
    kernel; and whether what is elementwise of a matrix is part of the product that takes it, or written before.
    """

    is_cpu: bool
    chunk_bytes: int
    least_tokens: int
    least_halved: int
    few: int = 0
    chains: bool = False
    fuses_operands: bool = False

    def chunks(self, given: ChunkSize, logits, halved: bool) -> Chunks:
        """Of the size given, or by the rule, of a token's logits."""
        devices, (size, filled) = auto_devices(), given
        if size is None:
            least = self.least_halved if halved else self.least_tokens
            most = self.chunk_bytes * (8 if logits.size < self.few else 1)
            size = devices * max(least, most // (logits.dtype.itemsize * logits.size))
        # Tokens that lie apart cost a CPU a copy of all, and a step of its own is one more sum over devices.
        peeled = not self.is_cpu and devices == 1
        return Chunks(size, devices, apart=not self.is_cpu or devices > 1, peeled=peeled, filled=filled)


# A CPU is faster at logits that its caches hold.
CPU = Platform(True, 2**22, 512, 512, few=256)
# A chunk's product takes as long as reading the head and the float32 sum of its gradient, which it hides, from 1200
# tokens on an H100, 1000 on a TPU v5e and 2200 on a v6e.
TPU = Platform(False, 2**28, 2048, 4096, fuses_operands=True)
GPU = Platform(False, 2**28, 2048, 2048, chains=True)


def named(platform: str | None) -> Platform:
    """By JAX's name."""
    return CPU if platform == "cpu" else TPU if platform == "tpu" else GPU


def on_platform(function: Callable, key: Callable, *arguments):
    """function(platform, *arguments), of the platform for which it is lowered; of those with one key(platform) one."""

    def on(platform):
        return lambda *arguments: function(platform, *arguments)

    tpu = {} if key(TPU) == key(GPU) else {"tpu": on(TPU)}
    return lax.platform_dependent(*arguments, cpu=on(CPU), default=on(GPU), **tpu)
