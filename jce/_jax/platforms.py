"""What differs between platforms: how rows are summed, and how many tokens, and which, a chunk of a head takes.

The platform is known when a program is lowered, not when it is traced. There are two ways to ask for it. A function of
rows waits for it (`waiting.py`), and is traced at lowering, for that platform alone. A loop over tokens asks by
`on_platform`: all versions are traced, and each platform lowers its own. If a loop waited, its value and its tangent
would be two loops, which XLA doesn't merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import lax

from jce._jax.layout import auto_devices


class ChunkSize(NamedTuple):
    """A caller's choice: how many tokens a chunk has, or None for the platform's rule; and whether each chunk is filled
    up to this size, however few tokens there are."""

    tokens: int | None
    filled: bool = False


class Chunks(NamedTuple):
    """A loop's chunks: their number of tokens; over how many devices XLA may split them; whether a chunk takes every
    k-th token (strided) or consecutive ones; whether the first is peeled off the loop; whether each is filled up."""

    size: int
    devices: int
    strided: bool
    peeled: bool
    filled: bool


class Platform(NamedTuple):
    """How a platform sums and multiplies a chunk, and how many tokens a chunk has.

    On each device a chunk has so many tokens that their logits fill `chunk_bytes`, and at least `least_tokens`: with
    fewer, reading the head and adding to its gradient would take longer than multiplying. Where logits are stored in
    half the bytes, the least number is `least_halved` instead. With fewer than `few` classes chunks are 8 times as
    large: smaller ones would save less than the loop's steps cost. `masks_labels` says whether looking up a label by a
    mask, in a sum over its row, is faster than a gather. `fuses_operands` says whether XLA computes an elementwise
    operand of a matrix product inside the product, instead of storing it first.
    """

    is_cpu: bool
    chunk_bytes: int
    least_tokens: int
    least_halved: int
    few: int = 0
    masks_labels: bool = False
    fuses_operands: bool = False

    def chunks(self, given: ChunkSize, logits, halved: bool) -> Chunks:
        """The chunks of a loop, of the size given or by the rule, where `logits` are one token's."""
        devices, (size, filled) = auto_devices(), given
        if size is None:
            least = self.least_halved if halved else self.least_tokens
            most = self.chunk_bytes * (8 if logits.size < self.few else 1)
            size = devices * max(least, most // (logits.dtype.itemsize * logits.size))
        # Strided chunks would cost a CPU a copy of all tokens, and a peeled step several devices one more sum over
        # devices.
        peeled = not self.is_cpu and devices == 1
        return Chunks(size, devices, strided=not self.is_cpu or devices > 1, peeled=peeled, filled=filled)


# A CPU is faster at logits that fit in its caches.
CPU = Platform(True, 2**22, 512, 512, few=256)
# Adding to the head's float32 gradient reads and writes 8 n d bytes a chunk, which its product of 2 N n d operations
# hides from N = 4 · (operations/s)/(bytes/s) tokens on: 4 · 989e12/3.35e12 = 1200 on an H100, 4 · 197e12/0.82e12 = 1000
# on a TPU v5e and 4 · 918e12/1.64e12 = 2200 on a v6e.
TPU = Platform(False, 2**28, 2048, 4096, masks_labels=True, fuses_operands=True)
GPU = Platform(False, 2**28, 2048, 2048)


def named(platform: str | None) -> Platform:
    """The platform of this name in JAX."""
    return CPU if platform == "cpu" else TPU if platform == "tpu" else GPU


def on_platform(function: Callable, key: Callable, *arguments):
    """function(platform, *arguments) for the platform that it is lowered for; traced once for those with equal keys."""

    def on(platform):
        return lambda *arguments: function(platform, *arguments)

    tpu = {} if key(TPU) == key(GPU) else {"tpu": on(TPU)}
    return lax.platform_dependent(*arguments, cpu=on(CPU), default=on(GPU), **tpu)
