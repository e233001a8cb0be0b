"""Tries every float32 for functions of one number: functions of jce, and XLA's elementary functions. For exp, log and
tanh, the versions that jce calls are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bench.search.arguments import LARGEST_LOGIT
from bench.search.climb import Worst
from bench.search.functions import Searched
from bench.search.judging import LEAST, judged
from bench.search.scales import spacing
from jce._numerics.elementary import exp, log, tanh

CHUNK = 2**20
STRIDE = 4099  # in a quick run
# For |x| below this, exp x rounds to 1, and a function that is x to first order rounds to x.
SMALL = 2.0**-26


def bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def every_float(lowest: float, highest: float, stride: int) -> Iterator[np.ndarray]:
    """Every float between two ends of the same sign, in chunks of equal size. The last chunk repeats some floats."""
    first, last = sorted((bits(abs(lowest)), bits(abs(highest))))
    for start in range(first, last + 1, CHUNK * stride):
        some = np.arange(start, min(start + CHUNK * stride, last + 1), stride, dtype=np.int64).astype(np.int32)
        yield np.copysign(np.resize(some, CHUNK).view(np.float32), np.float32(lowest + highest))


def domain(searched: Searched) -> list[tuple[float, float]]:
    """The function's domain, without numbers so small that they could lead to subnormals."""
    if searched.kernel.domains == ((0, 1),):
        return [(LEAST, 1 - 2.0**-24)]
    return [(LEAST, LARGEST_LOGIT), (-LARGEST_LOGIT, -LEAST)]


def over_all(searched: Searched, stride: int, known: list[np.ndarray]) -> dict[str, Worst]:
    """The worst floats for each quantity."""
    worst = {quantity: Worst() for quantity in searched.quantities}
    chunks = [np.resize(np.array(known, np.float32), CHUNK)] if known else []
    for x in itertools.chain(chunks, *(every_float(*ends, stride) for ends in domain(searched))):
        found = judged(searched, [x], [])
        for quantity, of in worst.items():
            of.add(found[quantity].of_rows, [x])
    return worst


@dataclass(frozen=True)
class Elementary:
    """One of XLA's functions, over a range of one sign, with the same function in float64."""

    label: str
    function: Callable
    exact: Callable
    lowest: float
    highest: float


LARGEST = 3.4e38
ELEMENTARY = [
    Elementary("exp, below 0", exp, np.exp, -LARGEST_LOGIT, -SMALL),
    Elementary("exp, above 0", exp, np.exp, SMALL, 88.7),
    Elementary("log", log, np.log, 2.0**-126, LARGEST),
    Elementary("log1p, below 0", jnp.log1p, np.log1p, -(1 - 2.0**-24), -SMALL),
    Elementary("log1p, above 0", jnp.log1p, np.log1p, SMALL, LARGEST),
    Elementary("expm1, below 0", jnp.expm1, np.expm1, -LARGEST_LOGIT, -SMALL),
    Elementary("expm1, above 0", jnp.expm1, np.expm1, SMALL, 88.7),
    Elementary("tanh", tanh, np.tanh, SMALL, 20.0),
]
DIVISION = "division"


def errors(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    counts = np.isfinite(exact) & (np.abs(exact) > 2.0**-125) & (np.abs(exact) < LARGEST)
    return np.where(counts, np.abs(got.astype(np.float64) - exact) / spacing(np.where(counts, exact, 1)), 0)


def of_elementary(elementary: Elementary, stride: int, known: list[float]) -> Worst:
    worst, function = Worst(), jax.jit(elementary.function)
    chunks = [np.resize(np.array(known, np.float32), CHUNK)] if known else []
    for x in itertools.chain(chunks, every_float(elementary.lowest, elementary.highest, stride)):
        with np.errstate(all="ignore"):
            exact = elementary.exact(x.astype(np.float64))
        worst.add(errors(np.asarray(function(x)), exact), [x])
    return worst


def of_division(chunks: int, seed: int) -> Worst:
    """Divides random significands: the quotient of two significands is the same at every scale."""
    worst, function, rng = Worst(), jax.jit(lambda a, b: a / b), np.random.default_rng(seed)
    for _ in range(chunks):
        a, b = (rng.integers(bits(1), bits(2), CHUNK, dtype=np.int32).view(np.float32) for _ in range(2))
        worst.add(errors(np.asarray(function(a, b)), a.astype(np.float64) / b), [a, b])
    return worst
