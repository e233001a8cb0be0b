"""Growth of time and memory with the number of classes and of tokens, from 100 to 1,000,000, fitted to a power.

Value and gradient of `cross_entropy_with_integer_labels` and of `linear_cross_entropy` are measured. The exponent is
fitted to the last two decades, where the constant cost of a call no longer shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from bench.engines import GRADIENT
from bench.memory import PAGE, exponent
from bench.peers import JAX, TASKS, Task, engine_of
from bench.speed import interleaved, quartiles

SIZES = [10**k for k in range(2, 7)]
FEW_TOKENS = [8192, 16_384, 32_768]  # in a quick run; with MORE_CLASSES each is more than one chunk
TOKENS, CLASSES, MORE_CLASSES, WIDTH = 64, 64, 2048, 64  # sizes that stay fixed
FUNCTIONS = ("cross_entropy_with_integer_labels", "linear_cross_entropy")
DECADES = 2
MOST_BYTES = 2**33  # bytes of temporary memory; programs that need more do not run


class Point(NamedTuple):
    seconds: float
    temporaries: int | None  # known only for JAX


def points(task: Task, tokens: int, n: int, repetitions: int) -> dict[str, Point]:
    """Time and memory by library, except for libraries without derivatives or whose program needs too much memory."""
    arrays = task.sample(np.random.default_rng(2026), tokens, n, WIDTH)
    calls, wait, temporaries = {}, {}, {}
    for name, f in task.contenders(jax.default_backend()).items():
        engine = engine_of(name)
        inputs = [engine.put(x) for x in arrays]
        try:
            program = engine.program(f, GRADIENT, task.trained)
        except NotImplementedError:
            continue
        temporaries[name] = None
        if engine is JAX:
            program = program.lower(*inputs).compile()
            temporaries[name] = program.memory_analysis().temp_size_in_bytes
            if temporaries[name] > MOST_BYTES:
                continue
        calls[name], wait[name] = lambda program=program, inputs=inputs: program(*inputs), engine.wait
    seconds = interleaved(calls, wait, repetitions, 1e-3)
    return {name: Point(quartiles(x)[1], temporaries[name]) for name, x in seconds.items()}


def measure(task: Task, along: str, sizes: list[int], repetitions: int, classes: int = CLASSES) -> list[dict]:
    found = [
        points(task, size if along == "tokens" else TOKENS, size if along == "classes" else classes, repetitions)
        for size in sizes
    ]
    lines, last = [], slice(-DECADES - 1, None)
    for library in found[0]:
        could = [size for size, at in zip(sizes, found, strict=True) if library in at]
        seconds, memory = zip(*(at[library] for at in found if library in at), strict=True)
        line = {"function": task.label, "library": library, "mode": GRADIENT, "along": along, "sizes": could}
        line |= {"seconds_at": list(seconds), "time_exponent": exponent(could[last], seconds[last])}
        if None not in memory:
            line |= {"grown": list(memory), "exponent": exponent(could[last], memory[last], PAGE)}
        lines.append(line)
    return lines


def check(lines: list[dict]) -> None:
    """Checks that there are times. The times depend on the machine, so they are not checked."""
    assert all(min(line["seconds_at"]) > 0 for line in lines)


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and lines for each case. The first label is the number of cases."""
    todo = [(task, along) for task in TASKS for along in ("classes", "tokens") if task.label in FUNCTIONS]
    todo = [(task, along) for task, along in todo if only in task.label]
    yield str(len(todo)), []
    for task, along in todo:
        if not quick:
            found = measure(task, along, SIZES, 7)
        elif along == "tokens":
            found = measure(task, along, FEW_TOKENS, 3, MORE_CLASSES)
        else:
            found = measure(task, along, SIZES[:3], 3)
        yield f"{task.label}, along {along}", found
