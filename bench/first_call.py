"""Compile time: the time to trace, to lower and to compile a program. Also the number of lines of its jaxpr.

Nothing runs, and shapes hardly matter. The programs of jce and of other libraries are made in turn in one process, each
after clearing JAX's caches. The time is processor time in all threads, so other load on the machine hardly changes
ratios. The results have the least time of each step over several rounds. Programs are compiled for this machine and, if
the compilers are installed, for an H100 and a TPU v5e.
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import jce
from bench import children, compilers
from bench.engines import GRADIENT, HVP, MODES
from bench.peers import JAX, TASKS, Task, engine_of, surprisal

ROUNDS = 5
TOKENS, CLASSES, WIDTH = 128, 1000, 16
HERE = "here"
STEPS = ("trace", "lower", "compile")
DEVICES = ("h100", "v5e")
QUICK = ("cross_entropy_with_integer_labels", "kl_divergence_with_logits", "linear_cross_entropy")


def policy(reference, x):
    """A policy gradient with two heads: a clipped ratio at label 0, and a divergence from a reference."""
    ratio = jnp.exp(-jce.cross_entropy_with_integer_labels(0, x) + 1)
    return -jnp.minimum(ratio, jnp.clip(ratio, 0.8, 1.2)) + jce.kl_divergence_with_logits(x, reference)


def plain_policy(hp, wp, h, w):
    log_p, log_q = -surprisal(hp @ wp.T), -surprisal(h @ w.T)
    ratio = jnp.exp(log_q[:, 0] + 1)
    return (-jnp.minimum(ratio, jnp.clip(ratio, 0.8, 1.2)) + (jnp.exp(log_q) * (log_q - log_p)).sum(-1)).sum()


POLICY = Task(
    "linear_map",
    "kl_divergence_with_logits",
    {
        "jce": lambda hp, wp, h, w: jce.linear_map(policy, jce.Linear(hp, wp), jce.Linear(h, w), reduction="sum"),
        "jax": plain_policy,
    },
    kind="two heads",
    note="policy",
)


ALL = [*TASKS, POLICY]


def spent() -> float:
    """Seconds of processor time, in all threads of this process and in the compilers that it has called."""
    called = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + called.ru_utime + called.ru_stime


def steps(program: Callable, shapes: list[tuple], device: str) -> tuple[list[float], int]:
    """The seconds of each step, and the number of lines of the jaxpr."""
    jax.clear_caches()
    place = None if device == HERE else jax.sharding.SingleDeviceSharding(compilers.devices(device)[0])
    arguments = [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes]
    times = [spent()]
    traced = program.trace(*arguments)
    times.append(spent())
    lowered = traced.lower()
    times.append(spent())
    lowered.compile()
    times.append(spent())
    return [b - a for a, b in itertools.pairwise(times)], len(str(traced.jaxpr).splitlines())


def measured(task: Task, mode: str, rounds: int, device: str = HERE) -> list[dict]:
    """One line for each library that supports the mode."""
    shapes = task.shapes(TOKENS, CLASSES, WIDTH)
    shapes += [shapes[i] for i in task.trained] if mode == HVP else []
    found: dict[str, list] = {}
    for k in range(rounds + 1):
        for library in task.contenders(jax.default_backend()):
            if engine_of(library) is JAX and (k == 0 or library in found):
                try:
                    one = steps(JAX.program(task.functions[library], mode, task.trained), shapes, device)
                except (TypeError, ValueError, NotImplementedError):
                    continue
                found.setdefault(library, []).append(one)
    lines = []
    for library, (_, *some) in found.items():  # the first round isn't counted: it also imports modules
        seconds = {step: min(times[k] for times, _ in some) for k, step in enumerate(STEPS)}
        line = {"function": task.label, "library": library, "mode": mode, "shape": [TOKENS, CLASSES], "device": device}
        lines.append(line | seconds | {"first_call": sum(seconds.values()), "jaxpr_lines": some[0][1]})
    ours = lines[0]["first_call"]
    return [line | {"jce_over_it": ours / line["first_call"]} for line in lines]


def check(lines: list[dict]) -> None:
    """Checks that the jaxprs of functions of rows are short, because these functions aren't traced before the platform
    is known. This holds on every machine."""
    for line in lines:
        if line["library"] == "jce" and not line["function"].startswith(("linear", "binary")):
            assert line["jaxpr_lines"] < 400, line


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and lines for each case. The first label is the number of cases."""
    tasks = [task for task in ALL if only in task.label and (not quick or task.name in QUICK)]
    modes = (GRADIENT,) if quick else MODES
    there = [] if quick or compilers.missing() else [(device, task.label) for device in DEVICES for task in tasks]
    yield str(len(tasks) * len(modes) + len(there)), []
    for task in tasks:
        for mode in modes:
            yield f"{task.label}, {mode}", measured(task, mode, 1 if quick else ROUNDS)
    yield from children.lines("bench.first_call", there, compilers.environment(), quiet=True) if there else ()


def main() -> None:
    """Runs in the child process, which compiles for devices. Prints the lines of value and gradient."""
    for device, label in children.todo():
        task = next(task for task in ALL if task.label == label)
        children.tell(f"{device}, {label}", measured(task, GRADIENT, 1, device))


if __name__ == "__main__":
    main()
