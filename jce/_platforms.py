"""What differs between a CPU and an accelerator: how rows are summed, and in which order and size a head is computed.

The platform is known when a program is lowered, not when it is traced. What is computed of rows, and a head's loss with
its gradient, therefore waits (`_waiting.py`). Of other loops over tokens both ways are traced, and each platform lowers
its own: waiting, a loop's value and its tangent would be two loops, which XLA doesn't merge.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._layout import auto_devices
from jce._waiting import waiting

if TYPE_CHECKING:
    from jce._classes import Classes
    from jce._heads.products import Products

LONGEST_CHAIN = 16_384  # classes, of which XLA makes one kernel for a GPU


class Way(enum.Enum):
    """How rows are summed."""

    PASSES = "passes"  # a sum is a pass, and selects nothing: a CPU's
    REDUCTION = "reduction"  # one has several results, and reads a row once: an accelerator's
    CHAIN = "chain"  # all sums of a row, and what is made of them, are one kernel: a GPU's, of rows that fit a core


class Chunks(NamedTuple):
    """A loop's: of how many tokens, on how many devices, which, and whether the first comes before the loop."""

    size: int
    devices: int
    apart: bool
    peeled: bool


class Platform(NamedTuple):
    """How a chunk is summed and multiplied there, and how many tokens it has.

    As many as fill so many bytes with logits, but not fewer than `least_tokens`: with few, reading the head and adding
    to its gradient take longer than multiplying. So on each device, where XLA splits the tokens. And whether it makes a
    chain of sums over short rows one kernel.
    """

    is_cpu: bool
    chunk_bytes: int
    least_tokens: int
    chains: bool = False

    def chunks(self, size: int | None, bias) -> Chunks:
        """Of the size given, or by the rule."""
        devices = auto_devices()
        if size is None:
            size = devices * max(self.least_tokens, self.chunk_bytes // (bias.dtype.itemsize * bias.size))
        # Tokens that lie apart cost a CPU a copy of all, and a step of its own is one more sum over devices.
        return Chunks(size, devices, apart=not self.is_cpu or devices > 1, peeled=not self.is_cpu and devices == 1)

    def classes(self, classes: Classes, x) -> Classes:
        """Those of arrays like x, as they are summed here."""
        if self.is_cpu:
            return classes.folding(x)
        return classes._replace(way=Way.CHAIN if self.chains and may_chain(classes, x) else Way.REDUCTION)

    def products(self, products: Products, hidden, weight) -> Products:
        """They are narrow where all is bfloat16 and no precision is asked for. float16 has too small a range for it."""
        setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        asked = products.precision is not None or setting is not None
        return products._replace(narrow=not self.is_cpu and not asked and hidden.dtype == weight.dtype == jnp.bfloat16)


CPU = Platform(True, 2**25, 512)
# A chunk's product takes as long as reading the head and the float32 sum of its gradient, which it hides, from 1200
# tokens on an H100, 1000 on a TPU v5e and 2200 on a v6e.
ACCELERATOR = Platform(False, 2**28, 2048)
GPU = ACCELERATOR._replace(chains=True)


def named(platform: str | None) -> Platform:
    """By JAX's name."""
    return CPU if platform == "cpu" else ACCELERATOR if platform == "tpu" else GPU


def may_chain(classes: Classes, x) -> bool:
    return x.shape[classes.axis] <= LONGEST_CHAIN and classes.mesh_axis is None and not classes.are_split(x)


def on_platform(function: Callable, *arguments):
    """function(platform, *arguments), of the platform for which it is lowered."""

    def on(platform):
        return lambda *arguments: function(platform, *arguments)

    return lax.platform_dependent(*arguments, cpu=on(CPU), default=on(ACCELERATOR))


def on_cpu(there: Callable, elsewhere: Callable) -> Callable:
    """There on a CPU, elsewhere on others; no derivative keeps anything of the other."""
    here = there if CPU.is_cpu else elsewhere
    return jax.checkpoint(lambda *arguments: lax.platform_dependent(*arguments, cpu=here, default=elsewhere))


def per_platform(kernel: Callable, apart: bool = False) -> Callable:
    """A function of arrays, numbers a row and, last, the arrays' classes: of how they are summed where it is lowered.

    On a CPU it gets long rows folded. Apart, a GPU's kernel shares nothing with another of the same arrays: as one
    with two results they would be no chain.
    """

    @functools.wraps(kernel)
    def on_each(*arguments):
        *arrays, classes = arguments
        return kernel(*arguments) if classes.way is not None else waiting(_OfRows(kernel, classes, apart), *arrays)

    return on_each


@dataclasses.dataclass(frozen=True)
class _OfRows:
    kernel: Callable
    classes: Classes
    apart: bool

    def __call__(self, platform, *arrays):
        x = max(jax.tree.leaves(arrays), key=jnp.ndim)
        here = named(platform).classes(self.classes, x)
        arrays = jax.tree.map(lambda a: here.fold(a) if a.ndim == x.ndim else a, arrays)

        def function(*arrays):
            return self.kernel(*arrays, here)

        chain = here.way is Way.CHAIN
        results = _in_chains(function, arrays, x.ndim, self.apart) if chain else function(*arrays)
        return jax.tree.map(lambda r: here.unfold(r) if r.ndim >= x.ndim else r, results)


def _in_chains(function, arrays, ndim, apart):
    """Its results, each in a chain of its own, which also ends with a row: XLA may make no one of two, or of the sum of
    a row and that of a batch."""
    alone = jax.tree.map(lax.optimization_barrier, arrays)  # each its own, for t is unlike x
    results, tree = jax.tree.flatten(function(*(alone if apart else arrays)))
    results[1:] = [jax.tree.leaves(function(*alone))[i] for i in range(1, len(results))]
    return tree.unflatten([r if r.ndim == ndim else lax.optimization_barrier(r) for r in results])


per_platform_apart = functools.partial(per_platform, apart=True)


def at_label(x: Array, y: Array, classes: Classes) -> Array:
    """x at a local label, on an accelerator. A TPU gathers slowly, but masks while it reads for another sum; a GPU
    reads x once more for that."""
    return lax.platform_dependent(x, y, tpu=classes.at_by_mask, default=classes.at)


def except_on_tpu(function: Callable, x: Array, *others: Array) -> Array:
    """function(x, *others), but on a TPU x itself."""
    return lax.platform_dependent(x, *others, tpu=lambda x, *_: x, default=function)
