"""The size of chunks, and which tokens go into a chunk: a rule for each platform."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jce._jax.layout import auto_devices
from jce._jax.platforms import Platform


class Rule(NamedTuple):
    """The number of tokens that a chunk has on each device.

    The logits of these tokens fill `chunk_bytes`. But a chunk has at least `least_tokens` tokens: with fewer, reading
    the head and adding to its gradient would take longer than the matmuls. If logits are stored in half the bytes, it
    has at least `least_halved` tokens instead. With fewer than `few` classes, chunks are 8 times as large: the more
    numerous steps of a loop over smaller chunks would cost more than they save.
    """

    chunk_bytes: int
    least_tokens: int
    least_halved: int
    few: int = 0

    def size(self, logits: jax.ShapeDtypeStruct, halved: bool) -> int:
        """The number of tokens. `logits` are those of one token."""
        least = self.least_halved if halved else self.least_tokens
        most = self.chunk_bytes * (8 if logits.size < self.few else 1)
        return max(least, most // (logits.dtype.itemsize * logits.size))


# Adding to the head's float32 gradient reads and writes 8 n d bytes per chunk. The matmul for this gradient has 2 N n d
# operations. It hides the reads and writes if N is at least 4 · (operations/s)/(bytes/s) tokens: 4 · 989e12/3.35e12 =
# 1200 on an H100, 4 · 197e12/0.82e12 = 1000 on a TPU v5e and 4 · 918e12/1.64e12 = 2200 on a TPU v6e.
RULES = {
    "cpu": Rule(2**22, 512, 512, few=256),  # a CPU is faster at logits that fit in its caches
    "tpu": Rule(2**28, 2048, 4096),
    "gpu": Rule(2**28, 2048, 2048),
}


class Chunks(NamedTuple):
    """The chunks of a loop."""

    size: int  # the number of tokens per chunk
    devices: int  # over how many devices XLA may split a chunk
    strided: bool  # whether a chunk takes every k-th token instead of consecutive ones
    peeled: bool  # whether the first chunk is peeled off the loop
    filled: bool  # whether each chunk is padded to `size`


def chunks_of(
    platform: Platform, chunk_size: int | None, filled: bool, logits: jax.ShapeDtypeStruct, halved: bool
) -> Chunks:
    """The chunks of a loop, in the given size or by the platform's rule."""
    devices, is_cpu = auto_devices(), platform.is_cpu
    size = devices * RULES[platform.name].size(logits, halved) if chunk_size is None else chunk_size
    # On a CPU, strided chunks would cost a copy of all tokens. On several devices, a peeled step would cost one more
    # sum over devices.
    return Chunks(size, devices, not is_cpu or devices > 1, not is_cpu and devices == 1, filled)
