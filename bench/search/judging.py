"""Measures a function's error: at many arguments against the same function in float64, at a single one by mpmath."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np

from bench.search.functions import VALUE, Searched
from bench.search.scales import HVP, SCALES, conditioning, lost_of_differences, spacing
from tests.kernels import total
from tests.oracle import entries, partial, precision, second_partial, to_mp

LEAST, MOST = 2.0**-63, 2.0**63  # beyond these a square is subnormal (XLA on a CPU makes it 0) or infinite


@functools.cache
def programs(searched: Searched) -> list[Callable]:
    """Programs of (arguments, directions): one returns value and gradient, and another the HVP if it is searched."""
    kernel, positions = searched.kernel, tuple(range(len(searched.kernel.arguments)))
    gradient = jax.grad(total(kernel), positions)

    def first(arguments, _):
        return [kernel.function(*arguments), *([] if searched.value_only else gradient(*arguments))]

    def second(arguments, directions):
        return jax.jvp(gradient, arguments, directions)[1]

    return [jax.jit(first), *([jax.jit(second)] if searched.hvp else [])]


def results(searched: Searched, arguments: list, directions: list, dtype) -> dict[str, np.ndarray]:
    arguments, directions = (tuple(jnp.asarray(x, dtype) for x in some) for some in (arguments, directions))
    found = [x for program in programs(searched) for x in program(arguments, directions)]
    return {name: np.asarray(x, np.float64) for name, x in zip(searched.quantities, found, strict=True)}


def scales(searched: Searched, arguments: list, directions: list, exact: dict) -> dict[str, np.ndarray]:
    """The scales that errors are relative to: those of terms that may cancel, otherwise the results themselves."""
    known = SCALES.get(searched.key, {})
    found = {name: known[name](*arguments) if name in known else np.abs(x) for name, x in exact.items()}
    if searched.hvp:
        of_hvp = zip(searched.kernel.arguments, known[HVP](*arguments, *directions), strict=True)
        found |= {f"{HVP}, {name}": scale for name, scale in of_hvp}
    return found


@dataclass(frozen=True)
class Judged:
    """The results for one quantity and their errors in ulps: per argument, and per class if there are classes."""

    got: np.ndarray
    exact: np.ndarray
    ulp: np.ndarray
    beyond: np.ndarray | float
    counts: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            error = np.maximum(np.abs(self.got - self.exact) / self.ulp - self.beyond, 0)
        error = np.where(np.isfinite(self.got), error, np.inf)
        return np.where(self.counts, error, 0)

    @property
    def of_rows(self) -> np.ndarray:
        return self.errors if self.errors.ndim == 1 else self.errors.max(-1)


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Runs the block in float64 on the host's CPU, since an accelerator may lack float64."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def judged(searched: Searched, arguments: list, directions: list, off_grid: bool = False) -> dict[str, Judged]:
    """Compares with the same function in float64 on the host, at the same floats. Tests compare float64 with mpmath.

    Off the grid, second derivatives aren't judged, and the effect of rounding each difference of logits by half an ulp
    is subtracted from the error.
    """
    with np.errstate(all="ignore"):
        got = results(searched, arguments, directions, jnp.float32)
        arguments, directions = ([x.astype(np.float64) for x in some] for some in (arguments, directions))
        with on_host():
            exact = results(searched, arguments, directions, jnp.float64)
        of_differences = lost_of_differences(searched.key, arguments, exact) if off_grid else {}
        found = {}
        for name, scale in scales(searched, arguments, directions, exact).items():
            counts = np.isfinite(exact[name]) & np.isfinite(scale) & (scale > LEAST) & (scale < MOST)
            ulp = spacing(np.where(counts, scale, 1))
            beyond = 0.0
            if off_grid:
                beyond = conditioning(searched.kernel, arguments, scale.ndim > 1) + of_differences.get(name, 0) / ulp
                counts = counts & ~name.startswith(HVP)
            found[name] = Judged(got[name], exact[name], ulp, beyond, counts)
        return found


def by_mpmath(searched: Searched, quantity: str, point: list, place: int) -> mp.mpf:
    """The formula in mpmath, or its derivative with respect to one entry. An HVP's point includes directions."""
    kernel, k = searched.kernel, len(searched.kernel.arguments)
    row, directions = to_mp(point[:k]), to_mp(point[k:])
    with precision(kernel, point[:k]):
        if quantity == VALUE:
            return kernel.formula(*row)
        i = next(i for i, name in enumerate(kernel.arguments) if quantity in (f"∂{name}", f"{HVP}, {name}"))
        entry = (i, place, step_of(row, i, place))
        if not quantity.startswith(HVP):
            return partial(kernel.formula, row, entry)
        along = [(a, b, t) for a, b, t in entries(directions) if t]
        return sum(second_partial(kernel.formula, row, entry, (a, b, step_of(row, a, b))) * t for a, b, t in along)


def step_of(row: tuple, argument: int, place: int) -> mp.mpf:
    """The number at this place, to which the step is proportional. 1 if the number is 0."""
    x = row[argument][place] if isinstance(row[argument], list) else row[argument]
    return x or mp.mpf(1)
