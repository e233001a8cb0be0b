"""How many tokens a chunk has, and which ones: a rule for each platform."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jce._jax.layout import auto_devices
from jce._jax.platforms import Platform


class Rule(NamedTuple):
    """On each device a chunk has so many tokens that their logits fill `chunk_bytes`, and at least `least_tokens`: with
    fewer, reading the head and adding to its gradient would take longer than multiplying. Where logits are stored in
    half the bytes, the least number is `least_halved` instead. With fewer than `few` classes chunks are 8 times as
    large: smaller ones would save less than the loop's steps cost."""

    chunk_bytes: int
    least_tokens: int
    least_halved: int
    few: int = 0

    def size(self, logits: jax.ShapeDtypeStruct, halved: bool) -> int:
        """The number of tokens, where `logits` are one token's."""
        least = self.least_halved if halved else self.least_tokens
        most = self.chunk_bytes * (8 if logits.size < self.few else 1)
        return max(least, most // (logits.dtype.itemsize * logits.size))


# Adding to the head's float32 gradient reads and writes 8 n d bytes a chunk, which its product of 2 N n d operations
# hides from N = 4 · (operations/s)/(bytes/s) tokens on: 4 · 989e12/3.35e12 = 1200 on an H100, 4 · 197e12/0.82e12 = 1000
# on a TPU v5e and 4 · 918e12/1.64e12 = 2200 on a v6e.
RULES = {
    "cpu": Rule(2**22, 512, 512, few=256),  # a CPU is faster at logits that fit in its caches
    "tpu": Rule(2**28, 2048, 4096),
    "gpu": Rule(2**28, 2048, 2048),
}


class Chunks(NamedTuple):
    """A loop's chunks: their number of tokens; over how many devices XLA may split them; whether a chunk takes every
    k-th token (strided) or consecutive ones; whether the first is peeled off the loop; whether each is filled up."""

    size: int
    devices: int
    strided: bool
    peeled: bool
    filled: bool


def chunks_of(
    platform: Platform, chunk_size: int | None, filled: bool, logits: jax.ShapeDtypeStruct, halved: bool
) -> Chunks:
    """The chunks of a loop, of the size given or by the platform's rule."""
    devices, is_cpu = auto_devices(), platform.is_cpu
    size = devices * RULES[platform.name].size(logits, halved) if chunk_size is None else chunk_size
    # Strided chunks would cost a CPU a copy of all tokens, and a peeled step several devices one more sum over devices.
    return Chunks(size, devices, not is_cpu or devices > 1, not is_cpu and devices == 1, filled)
