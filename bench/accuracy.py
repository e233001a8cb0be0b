"""Errors of values and derivatives in ulps, against the formula in mpmath on the exact stored floats.

There is one line for each function, library, dtype and quantity. It has for each regime (kind of input):

- the median and the largest error
- the number of results that are NaN, have the wrong sign, or are exactly 0 although the exact result is not
- `beyond`: the largest error if the effect of rounding x - max x (by half an ulp) on its exponential isn't counted

Errors are relative to the result. If the result passes through 0, they are relative to the scale in the tests' table.
A library whose median error in the first regime, an easy one, is at least 0.1 % computes another formula, and is
reported to disagree. Results below the normal range are not counted, because XLA on a CPU replaces them by 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import mpmath as mp
import numpy as np

from bench.engines import GRADIENT, VALUE, fetched
from bench.peers import TASKS, Task, engine_of
from tests.oracle import conditioning, distributions, interior, partial, precision, to_mp, ulps

CLASSES = 16
SEEDS = (2026, 2027)
DISAGREES = 1e-3
QUICK = (
    "cross_entropy_with_integer_labels",
    "binary_kl_divergence",
    "kl_divergence_with_logits",
    "linear_cross_entropy",
)


@dataclass(frozen=True)
class Truth:
    """The exact result for a quantity at one place of one row."""

    row: int
    place: int
    exact: mp.mpf
    scale: mp.mpf
    conditioning: float

    def counts(self, dtype) -> bool:
        return bool(np.finfo(dtype).tiny <= abs(self.scale) <= np.finfo(dtype).max)


def bars(task: Task) -> dict[str, float]:
    """The bound in ulps on jce's error in each quantity, from the tests' table."""
    names = ["value", *(f"∂{name}" for name in task.kernel.arguments)]
    return dict(zip(names, [task.kernel.value_bar, *task.kernel.gradient_bar], strict=True))


def sampled(task: Task, rows: int, dtype) -> tuple[list[str], list[np.ndarray]]:
    """The regime of each row, and the rows of each argument, for all seeds."""
    shape = (rows, CLASSES) if task.kernel.has_classes else (rows,)
    samples = [task.kernel.sample(np.random.default_rng(seed), shape, dtype) for seed in SEEDS]
    if task.has_heads:  # an infinite logit would give 0 · ∞ in the matmul with the identity
        samples = [{name: x for name, x in s.items() if np.isfinite(x).all()} for s in samples]
    names = [name for s in samples for name in s for _ in range(rows)]
    arrays = zip(*(arguments for s in samples for arguments in s.values()), strict=True)
    return names, [np.concatenate(parts) for parts in arrays]


def truths(task: Task, arrays: list[np.ndarray], dtype) -> dict[str, list[Truth]]:
    kernel, found = task.kernel, {name: [] for name in bars(task)}
    for r, row in enumerate(distributions(kernel, *arrays)):
        with precision(kernel, row):
            x = to_mp(row)
            exact = kernel.formula(*x)
            scale = kernel.value_scale(*x) if kernel.value_scale else exact
            found["value"].append(Truth(r, 0, exact, scale, conditioning(kernel, x, dtype)))
            scales = [f and f(*x) for f in kernel.gradient_scale]
            for i, j, entry in interior(kernel, x):
                exact = partial(kernel.formula, x, (i, j, entry))
                known = scales[i][j] if scales[i] else exact
                truth = Truth(r, j, exact, known, conditioning(kernel, x, dtype, j))
                found[list(bars(task))[1 + i]].append(truth)
    return found


def results(task: Task, library: str, arrays: list[np.ndarray], dtype) -> dict[str, np.ndarray]:
    """By quantity, an array of rows × places. Quantities that the library can't compute are absent."""
    engine = engine_of(library)
    f, arguments = task.functions[library], task.from_row(arrays)
    found = {}
    full = jax.default_matmul_precision("highest")  # for the matmuls of heads, on every device
    with jax.enable_x64(dtype == np.float64), full, np.errstate(all="ignore"):
        placed = [engine.put(x) for x in arguments]
        program = engine.program(f, VALUE, task.places)
        if task.has_heads:  # it returns a sum over tokens, so it gets one token at a time
            rows = (
                [engine.put(x if i in task.heads else x[r : r + 1]) for i, x in enumerate(arguments)]
                for r in range(len(arrays[0]))
            )
            found["value"] = np.array([float(program(*row)) for row in rows])[:, None]
        else:
            found["value"] = fetched(program(*placed)).reshape(len(arrays[0]), 1)
        for place, name in zip(task.places, list(bars(task))[1:], strict=True):
            try:
                _, (gradient,) = engine.program(f, GRADIENT, (place,))(*placed)
            except (NotImplementedError, RuntimeError):  # PyTorch raises it for a target without a derivative
                continue
            found[name] = fetched(gradient).reshape(len(arrays[0]), -1)
    return found


def judged(regimes: list[str], truth: list[Truth], got: np.ndarray, dtype) -> dict[str, dict[str, float]]:
    """Statistics of the errors, by regime."""
    errors: dict[str, list[tuple]] = {}
    for t in truth:
        if t.counts(dtype):
            x = got[t.row, t.place]
            error = ulps(x, t.exact, t.scale, dtype)
            wrong_sign = bool(x * t.exact < 0 and t.scale == t.exact)
            zero = bool(x == 0 and t.exact != 0 and t.scale == t.exact)
            beyond = max(0.0, error - t.conditioning)
            errors.setdefault(regimes[t.row], []).append((error, beyond, np.isnan(x), wrong_sign, zero))
    statistics = {}
    for regime, rows in errors.items():
        error, beyond, nan, wrong_sign, zero = (np.array(x) for x in zip(*rows, strict=True))
        numbers = {"median": np.median(error), "max": error.max(), "beyond": beyond.max()}  # ∞ if one is NaN
        counts = {"nan": nan.sum(), "wrong sign": wrong_sign.sum(), "zero": zero.sum()}
        statistics[regime] = {k: float(f"{x:.3g}") for k, x in numbers.items()}
        statistics[regime] |= {"of": len(rows)} | {k: int(x) for k, x in counts.items() if x}
    return statistics


def measure(task: Task, rows: int, dtype) -> Iterator[dict]:
    regimes, arrays = sampled(task, rows, dtype)
    truth = truths(task, arrays, dtype)
    for library in task.contenders():
        for quantity, got in results(task, library, arrays, dtype).items():
            by_regime = judged(regimes, truth[quantity], got, dtype)
            easiest = next(iter(by_regime.values()))["median"]
            yield {
                "function": task.label,
                "library": library,
                "dtype": np.dtype(dtype).name,
                "quantity": quantity,
                "agrees": bool(easiest * np.finfo(dtype).eps < DISAGREES),
                "regimes": by_regime,
            }


def check(lines: list[dict]) -> None:
    """Checks that jce's errors are within the bounds. This holds on every machine."""
    allowed = {task.label: bars(task) for task in TASKS}
    for line in (x for x in lines if x["library"] == "jce"):
        worst = max(statistics["beyond"] for statistics in line["regimes"].values())
        assert worst <= allowed[line["function"]][line["quantity"]], (line["function"], line["quantity"], worst)


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and lines for each function and dtype. The first label is their number."""
    tasks = [task for task in TASKS if (only in task.label if only or not quick else task.label in QUICK)]
    todo = [(task, dtype) for dtype in ([np.float32] if quick else [np.float32, np.float64]) for task in tasks]
    yield str(len(todo)), []
    for task, dtype in todo:
        yield f"{task.label}, {np.dtype(dtype).name}", list(measure(task, 1 if quick else 12, dtype))
