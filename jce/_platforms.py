"""What differs between a CPU and an accelerator: in which order and size a head is computed, not what.

The platform is known when a program is lowered, not when it is traced: it may be compiled for another machine, or
exported for several. So both ways are traced, and each platform lowers its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._classes import Classes
from jce._layout import auto_devices
from jce._products import Products


class Chunks(NamedTuple):
    """A loop's: of how many tokens, on how many devices, which, and whether the first comes before the loop."""

    size: int
    devices: int
    apart: bool
    peeled: bool


class Platform(NamedTuple):
    """How a chunk is summed and multiplied there, and how many tokens it has.

    As many as fill so many bytes with logits, but not fewer than `least_tokens`: with few, reading the head and adding
    to its gradient take longer than multiplying. So on each device, where XLA splits the tokens.
    """

    is_cpu: bool
    chunk_bytes: int
    least_tokens: int

    def chunks(self, size: int | None, bias) -> Chunks:
        """Of the size given, or by the rule."""
        devices = auto_devices()
        if size is None:
            size = devices * max(self.least_tokens, self.chunk_bytes // (bias.dtype.itemsize * bias.size))
        # Tokens that lie apart cost a CPU a copy of all, and a step of its own is one more sum over devices.
        return Chunks(size, devices, apart=not self.is_cpu or devices > 1, peeled=not self.is_cpu and devices == 1)

    def classes(self, classes: Classes, bias) -> Classes:
        return classes.folding(bias) if self.is_cpu else classes._replace(masks=True)

    def products(self, products: Products, hidden, weight) -> Products:
        """They are narrow where all is bfloat16 and no precision is asked for. float16 has too small a range for it."""
        setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        asked = products.precision is not None or setting is not None
        return products._replace(narrow=not self.is_cpu and not asked and hidden.dtype == weight.dtype == jnp.bfloat16)


CPU = Platform(True, 2**25, 512)
# A chunk's product takes as long as reading the head and the float32 sum of its gradient, which it hides, from 1200
# tokens on an H100, 1000 on a TPU v5e and 2200 on a v6e.
ACCELERATOR = Platform(False, 2**28, 2048)


def on_platform(function: Callable, *arguments):
    """function(platform, *arguments), of the platform for which it is lowered."""

    def on(platform):
        return lambda *arguments: function(platform, *arguments)

    return lax.platform_dependent(*arguments, cpu=on(CPU), default=on(ACCELERATOR))


def at_label(x: Array, y: Array, classes: Classes) -> Array:
    """x at a local label, on an accelerator. A TPU gathers slowly, but masks while it reads for another sum; a GPU
    reads x once more for that."""
    return lax.platform_dependent(x, y, tpu=classes.at_by_mask, default=classes.at)
