"""Temporary memory: the memory of a program in addition to its arguments and results, as reported by XLA.

Programs are compiled for shapes only. Nothing runs, so real sizes are possible: 8192 tokens with each model's head.
The growth with the number of tokens and of classes is fitted to a power: temporaries ~ size^exponent. On a CPU, XLA
does not report the memory inside of a fusion. If the whole program is one fusion, the figure is therefore 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from bench.engines import GRADIENT, HVP, MODES, VALUE
from bench.models import MODELS
from bench.peers import JAX, TASKS, Task, engine_of

TOKENS = 8192
PAGE = 4096.0  # bytes; smaller amounts count as this
HEADS = ("linear_cross_entropy", "linear_kl_divergence")
GROWN = ("cross_entropy_with_integer_labels", "cross_entropy_with_logits", *HEADS)
SIZES = [10**3, 10**4, 10**5, 10**6]
FIXED_CLASSES, FIXED_WIDTH = 32_000, 512


def temporaries(task: Task, library: str, mode: str, tokens: int, n: int, width: int) -> int | None:
    """The temporary memory in bytes, or None if the library does not support the mode."""
    shapes = task.shapes(tokens, n, width)
    shapes += [shapes[i] for i in task.trained] if mode == HVP else []
    program = JAX.program(task.functions[library], mode, task.trained)
    try:
        lowered = program.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    except (TypeError, ValueError, NotImplementedError):
        return None
    return lowered.compile().memory_analysis().temp_size_in_bytes


def exponent(sizes: list[int], found: list[float], least: float = 0.0) -> float:
    """The slope of log `found` over log `sizes`. Numbers below `least` count as `least`."""
    slope, _ = np.polyfit(np.log(sizes), np.log(np.maximum(found, least)), 1)
    return round(float(slope), 2) + 0.0  # not -0


def contenders(task: Task) -> list[str]:
    """The libraries that run on JAX. XLA does not report the memory of other libraries."""
    return [name for name in task.contenders(jax.default_backend()) if engine_of(name) is JAX]


def at_models(task: Task, models: list, modes: tuple[str, ...]) -> list[dict]:
    return [
        {
            "function": task.label,
            "library": library,
            "mode": mode,
            "model": model.name,
            "shape": [TOKENS, *([model.width] if task.has_heads else []), model.classes],
            "temporaries": temporaries(task, library, mode, TOKENS, model.classes, model.width),
        }
        for model in models
        for library in contenders(task)
        for mode in modes
    ]


def growth(task: Task, along: str, sizes: list[int], modes: tuple[str, ...]) -> list[dict]:
    lines = []
    for library in contenders(task):
        for mode in modes:
            found = [
                temporaries(
                    task,
                    library,
                    mode,
                    size if along == "tokens" else TOKENS,
                    size if along == "classes" else FIXED_CLASSES,
                    FIXED_WIDTH,
                )
                for size in sizes
            ]
            line = {"function": task.label, "library": library, "mode": mode, "along": along, "sizes": sizes}
            if None not in found:
                line |= {"grown": found, "exponent": exponent(sizes, found, PAGE)}
            lines.append(line)
    return lines


def check(lines: list[dict]) -> None:
    """Checks that the memory of jce's heads, with or without gradient, does not grow with the number of tokens. This
    holds on every machine."""
    for line in lines:
        if line["function"] in HEADS and (line["library"], line.get("along")) == ("jce", "tokens"):
            assert line["mode"] == HVP or line["exponent"] < 0.1, line


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and lines for each case. The first label is the number of cases."""
    tasks = [task for task in TASKS if only in task.label and task.kernel.has_classes and not task.note]
    grown = [task for task in tasks if task.name in GROWN]
    if quick:
        tasks, grown = [], [task for task in grown if task.has_heads]
    modes, sizes = ((VALUE, GRADIENT), SIZES[:3:2]) if quick else (MODES, SIZES)
    ways = ("tokens",) if quick else ("tokens", "classes")
    yield str(len(tasks) + len(ways) * len(grown)), []
    for task in tasks:
        yield task.label, at_models(task, MODELS, modes)
    for task in grown:
        for along in ways:
            yield f"{task.label}, along {along}", growth(task, along, sizes, modes)
