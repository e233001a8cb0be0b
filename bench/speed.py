"""Run times of value, value and gradient, and a Hessian-vector product, compared with other libraries and a floor.

For each function, shape and mode, all libraries run in turn, after a warm-up, so that other load on the machine affects
all of them. Each call waits for its result. If calls are short, several are made before waiting, so that the throughput
of an accelerator is timed and not its latency. There is one line for each library. It has:

- the quartiles of the time in seconds
- that time divided by the floor's, and jce's time divided by that time, both from the same turn
- the compile time in seconds

The floor is a program that only reads the same arrays and writes results of the same size. For a head, it is the bare
matmuls: 1 for the value, 3 with the gradient, 7 for the Hessian-vector product, and 1 more for a teacher's head.

On a CPU, everything runs twice, in separate processes. With `malloc` "pinned", the C library's allocator
keeps freed memory. With "default", it takes big arrays from the system in every call, page by page.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import children
from bench.engines import GRADIENT, HVP, MODES, VALUE
from bench.models import BATCHES, MODELS, Model
from bench.peers import JAX, TASKS, Task, engine_of

FLOOR, EAGER = "floor", "eager call"
PINNED = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "0",
}
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}  # keeps PyTorch's threads from spinning while the next library is timed


class Settings(NamedTuple):
    only: str  # part of a function's name
    models: tuple[str, ...]
    numbers: float  # how many logits
    multiplications: float  # in one matmul of a head
    repetitions: int
    least_seconds: float  # for one timing; shorter calls are repeated

    @classmethod
    def of(cls, quick: bool, only: str) -> Settings:
        on_cpu = jax.default_backend() == "cpu"
        names = tuple(m.name for m in MODELS)
        if quick:
            return cls(only or "linear_cross_entropy", names[1:2], 2**18, 2**26, 15, 1e-4)
        if on_cpu:
            return cls(only, (*names[:4], *(b.name for b in BATCHES)), 2**23, 1e10, 15, 2e-3)
        return cls(only, names, 2**28, 1e12, 15, 2e-3)


def interleaved(
    calls: dict[str, Callable], wait: dict[str, Callable], repetitions: int, least_seconds: float
) -> dict[str, np.ndarray]:
    """Seconds per call, by name, with one entry per turn."""

    def seconds(name: str, times: int) -> float:
        start = time.perf_counter()
        results = [calls[name]() for _ in range(times)] if times > 1 else calls[name]()
        wait[name](results)
        return (time.perf_counter() - start) / times

    once = {name: min(seconds(name, 1) for _ in range(2)) for name in calls}
    times = {name: max(1, min(1000, round(least_seconds / t))) for name, t in once.items()}
    turns = [{name: seconds(name, times[name]) for name in calls} for _ in range(repetitions)]
    return {name: np.array([turn[name] for turn in turns]) for name in calls}


def quartiles(x: np.ndarray) -> list[float]:
    return [float(f"{q:.4g}") for q in np.quantile(x, [0.25, 0.5, 0.75])]


def floor(task: Task, mode: str) -> Callable:
    """The work that every implementation must do."""
    if task.has_heads:
        products = {VALUE: product, GRADIENT: three_products, HVP: seven_products}[mode]
        if task.kind == "head":
            return products
        return lambda hp, wp, *student: (product(None, hp, wp), products(None, *student))

    def reads(*arrays):
        everything = sum(x for x in arrays if x.dtype != np.int32)
        if mode == VALUE:
            return everything.sum(-1) if task.kernel.has_classes else everything
        return tuple(everything + i for i, _ in enumerate(task.trained))

    return reads


def product(y, h, w):
    return h @ w.T


def three_products(y, h, w):
    g = h @ w.T
    return g @ w, g.T @ h


def seven_products(y, h, w, dh, dw):
    g, dg = h @ w.T, dh @ w.T + h @ dw.T
    return dg @ w + g @ dw, dg.T @ h + g.T @ dh


def same(a, b) -> bool:
    """Whether two results agree to 0.1 % of the largest number, or to 4 eps if that is more."""
    pairs = [map(on_device, pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return all(bool(near(x, y, max(1e-3, 4 * float(jnp.finfo(x.dtype).eps)))) for x, y in pairs)


def on_device(x) -> jax.Array:
    """JAX's arrays stay on the device: fetching a head's gradient takes longer than computing it."""
    return x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x))


@jax.jit
def near(x: jax.Array, y: jax.Array, within: float) -> jax.Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.abs(x - y).max() <= within * jnp.abs(y).max()


def peak_bytes() -> int | None:
    """The peak memory of this process on the device so far, or None if the device does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measure(task: Task, model: Model, mode: str, settings: Settings, dtype=np.float32) -> list[dict]:
    tokens = model.tokens(settings.numbers, settings.multiplications if task.has_heads else None)
    rng = np.random.default_rng(2026)
    arrays = task.sample(rng, tokens, model.classes, model.width)
    if mode == HVP:
        arrays += [rng.standard_normal(arrays[i].shape, np.float32) for i in task.trained]
    arrays = [x.astype(dtype) if x.dtype == np.float32 else x for x in arrays]
    calls, wait, costs, agrees, expected = {}, {}, {}, {}, None
    placed: dict[str, list] = {}
    for name in [*task.contenders(jax.default_backend()), FLOOR]:
        engine = JAX if name == FLOOR else engine_of(name)
        costs[name] = {"compile_seconds": None}
        if engine.name not in placed:
            placed[engine.name] = [engine.put(x) for x in arrays]
        inputs = placed[engine.name]
        try:
            if name == FLOOR:
                program = jax.jit(floor(task, mode))
            else:
                program = engine.program(task.functions[name], mode, task.trained)
            if engine is JAX:
                start = time.perf_counter()
                program = program.lower(*inputs).compile()
                costs[name]["compile_seconds"] = float(f"{time.perf_counter() - start:.3g}")
                costs[name]["temporaries"] = program.memory_analysis().temp_size_in_bytes
            before = peak_bytes()
            result = program(*inputs)
            engine.wait(result)
            if peak_bytes() != before:  # otherwise an earlier program needed more, and this peak is unknown
                costs[name]["peak_bytes"] = peak_bytes()
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            if name in ("jce", FLOOR):
                raise
            if not isinstance(error, NotImplementedError):  # a library without derivatives gets no line
                agrees[name] = f"can't: {type(error).__name__}"
            continue
        expected = result if expected is None else expected
        if name != FLOOR:
            agrees[name] = same(result, expected)
        calls[name], wait[name] = lambda program=program, inputs=inputs: program(*inputs), engine.wait
    del result, expected
    seconds = interleaved(calls, wait, settings.repetitions, settings.least_seconds)
    lines = []
    for name, agreed in agrees.items():
        line = {"function": task.label, "library": name, "mode": mode, "model": model.name}
        line["shape"] = [tokens, *([model.width] if task.has_heads else []), model.classes]
        line["agrees"] = agreed
        if name in seconds:
            line["seconds"] = quartiles(seconds[name])
            line["over_floor"] = quartiles(seconds[name] / seconds[FLOOR])
            line["jce_over_it"] = quartiles(seconds["jce"] / seconds[name])
            line |= costs[name]
        lines.append(line)
    return lines


def eager(task: Task, settings: Settings) -> list[dict]:
    """Times a call without jit, as a user types it, on 8 × 10 numbers. This is the cost of dispatch."""
    arrays = task.sample(np.random.default_rng(2026), 8, 10, 16)
    calls, wait = {}, {}
    for name, f in task.contenders(jax.default_backend()).items():
        engine = engine_of(name)
        inputs = [engine.put(x) for x in arrays]
        calls[name], wait[name] = lambda f=f, inputs=inputs: f(*inputs), engine.wait
    seconds = interleaved(calls, wait, settings.repetitions, settings.least_seconds)
    return [
        {"function": task.label, "library": name, "mode": EAGER, "seconds": quartiles(x)} for name, x in seconds.items()
    ]


def cases(settings: Settings) -> list[tuple[Task, Model | None, str]]:
    tasks = [task for task in TASKS if settings.only in task.label]
    models = [model for model in MODELS + BATCHES if model.name in settings.models]
    timed = [
        (task, model, mode)
        for task, model, mode in itertools.product(tasks, models, MODES)
        # the cost of elementwise functions depends only on the size
        if model in MODELS[:2] or (task.kernel.has_classes and not (model.rows and task.has_heads))
    ]
    return timed + [(task, None, EAGER) for task in tasks]


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and lines for each case. The first label is the number of cases."""
    settings = Settings.of(quick, only)
    kinds = {"pinned": PINNED, "default": {}} if jax.default_backend() == "cpu" else {"default": {}}
    yield str(len(kinds) * len(cases(settings))), []
    for malloc, variables in kinds.items():
        for label, lines in children.lines("bench.speed", settings, os.environ | QUIET | variables):
            yield label, [line | {"malloc": malloc} for line in lines]


def check(lines: list[dict]) -> None:
    """Checks that all libraries compute the same. This holds on every machine."""
    wrong = [(x["function"], x["library"], x["mode"]) for x in lines if x.get("agrees") is False]
    assert not wrong, wrong


def main() -> None:
    """Runs in the child process. Prints the lines of each case."""
    only, models, *rest = children.todo()
    settings = Settings(only, tuple(models), *rest)
    for task, model, mode in cases(settings):
        lines = measure(task, model, mode, settings) if model else eager(task, settings)
        children.tell(f"{task.label}, {model.name + ', ' if model else ''}{mode}", lines)


if __name__ == "__main__":
    main()
