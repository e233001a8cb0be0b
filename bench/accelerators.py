"""Estimates of what jce, and other JAX libraries, would cost on an H100 and on TPUs. None of these devices is needed.

Each function, mode and shape is compiled for each device. The cost is read from the compiled program: bytes, also as
passes over an array of logits; operations of matmuls; seconds by the roofline (see bench/roofline.py); the TPU
compiler's own count of cycles; kernels; and temporary memory. Nothing is timed.

The floor is the least cost of any implementation. A function of logits or probabilities reads each input that it
depends on once, and writes each result once. A head does only its bare bfloat16 matmuls: 1 for the value, 3 with the
gradient, 7 for a Hessian-vector product, and 1 more for a frozen teacher's head.

The compilers run in a separate process, because the settings that they need would change the other benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jce
from bench import children, compilers, peers
from bench.engines import ALONE, GRADIENT, HVP, VALUE
from bench.models import MODELS, Model
from bench.peers import JAX, TASKS, engine_of, installed, kl_of_two_heads, of_label, surprisal
from bench.programs import WIDTHS, Unreadable, entry, leaves
from bench.roofline import DEVICES, cost

missing = compilers.missing
NUMBERS = 2**28  # logits: more than fit into a TPU's on-chip memory
TOKENS = 8192  # for heads
HEADS = [*MODELS[2:4], Model("Llama 3.1 8B", 128_256, 4096), Model("Gemma 2 2B", 256_000, 2304)]
ROWS = [*MODELS[:2], Model("Mistral 7B v0.3", 32_768, 4096), MODELS[3]]
PRODUCTS = {"head": {VALUE: 1, GRADIENT: 3, HVP: 7}, "two heads": {VALUE: 2, GRADIENT: 4, HVP: 8}}
MODES = (VALUE, ALONE, GRADIENT, HVP)
HEAD, TWO_HEADS = "linear_cross_entropy", "linear_kl_divergence"


def optax_loss(y, x):
    return peers.optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def optax_kl(x, y):
    return peers.optax.losses.kl_divergence_with_log_targets(-surprisal(y), -surprisal(x)).mean()


def bfloat16(h, w):
    return (h @ w.T).astype(jnp.float32)


def float32(h, w):
    return jnp.matmul(h, w.T, preferred_element_type=jnp.float32)


def scan(hp, wp, h, w):
    return kl_of_two_heads(hp, wp, h, w, 2048, bfloat16) / len(h)


def bonus(log_probs, entropies):
    """A loss for policy gradients, with an entropy bonus."""
    return log_probs.mean() + 0.01 * entropies.mean()


def of_logits(y, x):
    return -of_label(surprisal(x), y), (jax.nn.softmax(x) * surprisal(x)).sum(-1)


def of_categorical(y, x):
    p = peers.distrax.Categorical(logits=x)
    return p.log_prob(y), p.entropy()


def bonus_of_token(y, x):
    return 0.01 * jce.entropy_with_logits(x) - jce.cross_entropy_with_integer_labels(y, x)


def in_one_loop(y, h, w):
    return jce.linear_map(bonus_of_token, y, jce.Linear(h, w), reduction="mean")


WITH_ENTROPY = {
    "jax, bfloat16 logits": lambda y, h, w: bonus(*of_logits(y, bfloat16(h, w))),
    "distrax, bfloat16 logits": lambda y, h, w: bonus(*of_categorical(y, bfloat16(h, w))),
}

# Hidden states and heads are bfloat16. For optax, the user makes the logits, in one of three ways: bfloat16 logits and
# a bfloat16 loss; bfloat16 logits and a float32 loss; float32 logits, as the matmul accumulates them.
HEAD_FUNCTIONS: dict[str, dict[str, Callable]] = {
    HEAD: {
        "jce": jce.linear_cross_entropy,
        "jax": lambda y, h, w: of_label(surprisal(bfloat16(h, w)), y).mean(),
        "optax, bfloat16 loss": lambda y, h, w: optax_loss(y, h @ w.T),
        "optax, bfloat16 logits": lambda y, h, w: optax_loss(y, bfloat16(h, w)),
        "optax, float32 logits": lambda y, h, w: optax_loss(y, float32(h, w)),
        "tokamax": lambda y, h, w: peers.tokamax.linear_softmax_cross_entropy_loss(h, y, w.T, reduction="mean"),
        "jax-cce": lambda y, h, w: peers.jax_cce.linear_cross_entropy(h, w, y),
    },
    "linear_log_probs": {"jce": lambda y, h, w: bonus(*jce.linear_log_probs(y, h, w)), **WITH_ENTROPY},
    "linear_map": {"jce": in_one_loop, **WITH_ENTROPY},
    TWO_HEADS: {
        "jce": lambda hp, wp, h, w: jce.linear_kl_divergence(jce.Linear(hp, wp), jce.Linear(h, w)),
        "jax, scan": scan,
        "optax, bfloat16 logits": lambda hp, wp, h, w: optax_kl(bfloat16(hp, wp), bfloat16(h, w)),
        "optax, float32 logits": lambda hp, wp, h, w: optax_kl(float32(hp, wp), float32(h, w)),
    },
}


class Case(NamedTuple):
    device: str
    function: str
    model: str
    modes: tuple[str, ...]


def cases(quick: bool, only: str) -> list[Case]:
    devices = ("h100", "v5e") if quick else tuple(DEVICES)
    found = []
    for task in sorted(TASKS, key=lambda task: not task.has_heads):
        if only not in task.label:
            continue
        if task.has_heads:
            models, modes = HEADS if task.label == HEAD else HEADS[2:3], tuple(PRODUCTS[task.kind])
        else:
            models = ROWS if task.kernel.has_classes else ROWS[1:2]  # for elementwise functions only the size matters
            modes = MODES
        found += [(task.label, model.name, modes) for model in models]
    if quick:
        shown = {("cross_entropy_with_integer_labels", "ResNet-50"), (HEAD, "GPT-2")}
        found = [(label, model, (VALUE, GRADIENT)) for label, model, _ in found if only or (label, model) in shown]
    return [Case(device, *rest) for device in devices for rest in found]


class Measured(NamedTuple):
    """The programs of one case: the function in each library, its arguments, and the matmuls of its floor."""

    functions: dict[str, Callable]
    arguments: list[tuple]  # shapes and dtypes
    trained: tuple[int, ...]
    shape: list[int]
    products: dict[str, int]  # matmuls of a head, by mode


def measured(case: Case) -> Measured:
    task = next(t for t in TASKS if t.label == case.function)
    if task.has_heads:
        model = next(m for m in HEADS if m.name == case.model)
        functions = HEAD_FUNCTIONS[task.label].items()
        there = {name: f for name, f in functions if installed(name)}
        shapes = task.shapes(TOKENS, model.classes, model.width)
        arguments = [(shape, jnp.bfloat16 if dtype == np.float32 else dtype) for shape, dtype in shapes]
        shape = [TOKENS, model.width, model.classes]
        return Measured(there, arguments, task.trained, shape, PRODUCTS[task.kind])
    model = next(m for m in ROWS if m.name == case.model)
    rows = NUMBERS // model.classes // 1024 * 1024
    there = {name: f for name, f in task.contenders().items() if engine_of(name) is JAX}
    return Measured(there, task.shapes(rows, model.classes, model.width), task.trained, [rows, model.classes], {})


def floor(what: Measured, mode: str, device: str, texts: Iterable[str]) -> float:
    """The least time of any implementation, in seconds."""
    if what.products:
        return what.products[mode] * 2 * np.prod(what.shape, dtype=float) / DEVICES[device].peaks["bf16"]
    return min(arguments_and_results(text) for text in texts) / DEVICES[device].bandwidth


def arguments_and_results(text: str) -> float:
    """The bytes of arguments and results, without padding. Unused arguments are not in the compiled program."""
    program = entry(text)
    arrays = [array for x in [*program.parameters, program.root] for array in leaves(x.shape)]
    return sum(array.numbers * WIDTHS[array.dtype] for array in arrays)


def taken(what: Measured, mode: str) -> list[tuple]:
    """The arguments of the program for a mode. For a Hessian-vector product, these include directions."""
    return what.arguments + ([what.arguments[i] for i in what.trained] if mode == HVP else [])


def measure(case: Case, mode: str) -> list[dict]:
    what, programs, costs, cannot = measured(case), {}, {}, {}
    for library, f in what.functions.items():
        try:
            program = compilers.compiled(JAX.program(f, mode, what.trained), case.device, taken(what, mode))
            costs[library] = cost(program.as_text(), DEVICES[case.device])
            programs[library] = program
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            cannot[library] = str(error) if isinstance(error, Unreadable) else type(error).__name__
    least = floor(what, mode, case.device, [program.as_text() for program in programs.values()]) if programs else None
    logits = what.shape[0] * what.shape[-1] * (2 if what.products else 4)
    lines = []
    for library in what.functions:
        line = {"function": case.function, "library": library, "mode": mode, "model": case.model, "device": case.device}
        line["shape"] = what.shape
        if library in cannot:
            lines.append(line | {"cannot": cannot[library]})
            continue
        found = costs[library]
        line["bytes"] = round(found.bytes)
        line["passes"] = float(f"{found.bytes / logits:.4g}")
        line["operations"] = {kind: float(f"{n:.6g}") for kind, n in found.operations.items()}
        line["roofline"] = float(f"{found.seconds:.5g}")
        line["roofline_over_floor"] = float(f"{found.seconds / least:.4g}")
        line |= {"cycles": found.cycles, "kernels": found.kernels}
        line["temporaries"] = programs[library].memory_analysis().temp_size_in_bytes
        lines.append(line)
    return lines


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and lines for each case and mode. The first label is their number."""
    todo = cases(quick, only)
    yield str(sum(len(case.modes) for case in todo)), []
    yield from children.lines("bench.accelerators", todo, compilers.environment(), quiet=True)


def check(lines: list[dict]) -> None:
    """Checks that the cost of each program of jce is known. Also checks that no program costs less than its floor (some
    cost would not have been counted), or has fewer matmul operations (it would compute another function)."""
    for line in lines:
        if "cannot" in line:
            assert line["library"] != "jce", line
            continue
        assert line["roofline_over_floor"] > 0.98, line
        if line["function"] in HEAD_FUNCTIONS:
            kind = next(task.kind for task in TASKS if task.label == line["function"])
            products = sum(line["operations"].values()) / (2 * math.prod(line["shape"]))
            assert products > 0.98 * PRODUCTS[kind][line["mode"]], line


def main() -> None:
    """Runs in the child process. Prints the lines of each case and mode."""
    for some in children.todo():
        case = Case(*some)
        for mode in case.modes:
            children.tell(f"{case.device}, {case.function}, {case.model}, {mode}", measure(case, mode))


if __name__ == "__main__":
    main()
