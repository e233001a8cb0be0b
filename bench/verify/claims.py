"""The claims of the READMEs and docstrings in one list, and how to check each against result lines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bench import results
from bench.accelerators import TOKENS
from bench.search import child, corpus
from bench.search.functions import ALL
from bench.verify.errors import known_errors
from bench.verify.times import LOSSES


class Found(NamedTuple):
    of: str  # a function, or another subject of a row in the table
    detail: str
    measured: float
    said: float | None  # the claimed number; None if nothing is claimed for this device


class Claim(NamedTuple):
    """A claim: its text, the place where it is made, a function that finds the measured numbers in result lines, and
    the factor by which a measured number may exceed the claimed one."""

    text: str
    source: str
    found: Callable[[list[dict]], Iterable[Found]]
    margin: float = 1.0
    of_machine: bool = False  # True if the machine may make the claim fail without a fault in jce

    def holds(self, found: Found) -> bool | None:
        return None if found.said is None else found.measured <= self.margin * found.said


KINDS = {"H100": "h100", "v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "TPU7x": "tpu7x"}
OVER_OPTAX = dict(zip(LOSSES, (1.5, 2.3, 3.2), strict=True))  # the README's figures, on a CPU


@functools.cache
def published(name: str) -> dict[tuple, dict]:
    lines = results.read(results.FOLDER / f"{name}.jsonl")
    return {(line.get("device", line.get("malloc")), *what(line)): line for line in lines}


def what(line: dict) -> tuple:
    return tuple(line.get(key) for key in ("function", "library", "mode", "model"))


def of_cpu(line: dict) -> bool:
    return line["environment"]["device"].startswith("CPU")


def compiled(line: dict, **others) -> dict:
    """The published line of the same program, compiled for this line's device and not run. {} if there is none."""
    kind = next((k for part, k in KINDS.items() if part in line["environment"]["device"]), None)
    return published("accelerators-compiled").get((kind, *what(line | others)), {})


def published_here(line: dict, name: str, malloc: str | None = None) -> dict:
    """The published CPU line for the same program and shape. {} if there is none."""
    found = published(name).get((malloc, *what(line)), {})
    return found if found.get("shape") == line["shape"] else {}


def of_ulps(lines: list[dict]) -> Iterator[Found]:
    by_label = {searched.label: searched for searched in ALL}
    for line in lines:
        if line["library"] == "jce" and "ulps" in line:
            function, quantity, kind = (line[key] for key in ("function", "quantity", "arguments"))
            detail = quantity if kind in (child.ANY, child.ALL_FLOATS) else f"{quantity}, {kind}"
            bar = by_label[function].bar(quantity, kind, on_cpu="environment" not in line or of_cpu(line))
            yield Found(function, detail, results.worst(line, "ulps"), bar)


def of_corners(lines: list[dict]) -> Iterator[Found]:
    some = [line for line in lines if "wrong" in line]
    wrong = [f"{line['function']} at {' and '.join(line['at'])}" for line in some if line["wrong"]]
    if some:
        of = f"{sum(line['of'] for line in some)} entries of {len(some)} functions"
        yield Found(of, "; ".join(wrong), sum(line["wrong"] for line in some), 0)


def of_xla(lines: list[dict]) -> Iterator[Found]:
    on_a_cpu = {line["function"]: corpus.worst(line) for line in known_errors() if line["library"] == "jax"}
    for line in lines:
        if line["library"] == "jax" and "ulps" in line:
            yield Found(line["function"], "", results.worst(line, "ulps"), on_a_cpu[line["function"]])


def of_heads(lines: list[dict]) -> Iterator[Found]:
    for line in lines:
        if "error" in line:
            # A bfloat16 gradient is rounded once, or twice on an accelerator.
            rounded = line["dtype"] == "bfloat16" and line["quantity"] != "value"
            function = line["function"] if line["dtype"] == "float32" else f"{line['function']}, {line['dtype']}"
            yield Found(function, line["quantity"], results.worst(line, "error"), 2**-7 if rounded else 2e-6)


def of_temporaries(lines: list[dict]) -> Iterator[Found]:
    """The temporary memory in gigabytes, for 8,192 tokens. Only this memory is compared with the claim.

    The detail has the temporary memory of other libraries. If the device reports peak memory, the detail also has the
    peak of each program, including jce's.
    """
    groups = results.grouped([line for line in lines if "temporaries" in line], "function", "model", "mode")
    for (function, model, mode), found in groups.items():
        ours = found["jce"]
        if ours["shape"][0] == TOKENS and len(ours["shape"]) == 3:
            said = published_here(ours, "memory-cpu") if of_cpu(ours) else compiled(ours)
            others = [f"{name} {of['temporaries'] / 1e9:.2f}" for name, of in found.items() if name != "jce"]
            peaks = [f"{name} {of['peak_bytes'] / 1e9:.2f} in all" for name, of in found.items() if "peak_bytes" in of]
            gigabytes = said["temporaries"] / 1e9 if said else None
            yield Found(f"{function}, {model}, {mode}", "; ".join(others + peaks), ours["temporaries"] / 1e9, gigabytes)


def of_products(lines: list[dict]) -> Iterator[Found]:
    for line in lines:
        if line["library"] == "jce" and "over_floor" in line and len(line["shape"]) == 3:
            if of_cpu(line):
                _, said, _ = published_here(line, "speed-cpu", "default").get("over_floor", [None] * 3)
            else:
                said = compiled(line).get("roofline_over_floor")
            detail = f"{1e3 * line['seconds'][1]:.4g} ms"
            yield Found(", ".join((line["function"], line["model"], line["mode"])), detail, line["over_floor"][1], said)


def of_optax(lines: list[dict]) -> Iterator[Found]:
    """jce's time divided by optax's. For an accelerator the claimed number is the ratio of the two rooflines."""
    for line in lines:
        if line["library"].startswith("optax") and "jce_over_it" in line:
            said = OVER_OPTAX.get(line["function"]) if of_cpu(line) else None
            if roofline := compiled(line).get("roofline"):
                said = compiled(line, library="jce")["roofline"] / roofline
            of = ", ".join((line["function"], line["model"], line["mode"]))
            yield Found(of, f"{line['library']} {1e3 * line['seconds'][1]:.4g} ms", line["jce_over_it"][1], said)


def of_chunks(lines: list[dict]) -> Iterator[Found]:
    timed = [line for line in lines if "seconds" in line and line["library"].startswith("jce")]
    for (function, model, mode), found in results.grouped(timed, "function", "model", "mode").items():
        seconds = {name: line["seconds"][1] for name, line in found.items()}
        ours = seconds.pop("jce")
        if seconds:
            best = min(seconds, key=lambda name: seconds[name])
            yield Found(f"{function}, {model}, {mode}", f"the fastest: {best}", ours / seconds[best], 1)


def of_failures(lines: list[dict]) -> Iterator[Found]:
    """Programs that don't run, and programs whose result differs from jce's."""
    failed = [f"{line['quantity']}: {line['cannot']}" for line in lines if "cannot" in line]
    failed += [", ".join(filter(None, what(line))) for line in lines if line.get("agrees") is False]
    yield Found("all programs", "; ".join(failed), len(failed), 0)


CLAIMS = [
    Claim("A float32 value or first derivative: ulps", "bench/README, the largest errors", of_ulps),
    Claim(
        "At 0, 1, ±∞ and NaN: entries that differ from the docstrings", "the docstrings, At the boundary", of_corners
    ),
    Claim("Heads: errors relative to the largest entry", "tests/test_linear.py, test_half_precision", of_heads),
    Claim(
        "XLA's own float32 functions: ulps",
        "bench/README, the largest errors, on a CPU",
        of_xla,
        of_machine=True,
    ),
    Claim(
        "A head with 8,192 tokens: temporary memory, GB",
        "README, Less memory; bench/README, heads",
        of_temporaries,
        margin=results.NOISE,
    ),
    Claim(
        "A head: time divided by that of its bare matmuls",
        "bench/README, heads (for an accelerator: a roofline)",
        of_products,
        results.NOISE,
        of_machine=True,
    ),
    Claim(
        "Time divided by optax's",
        "README, when not to use it (for an accelerator: rooflines)",
        of_optax,
        results.NOISE,
        of_machine=True,
    ),
    Claim(
        "The default chunks: time divided by that of the fastest of 2,048, 4,096 and 8,192 tokens",
        "linear_cross_entropy, chunk_size",
        of_chunks,
        results.NOISE,
        of_machine=True,
    ),
    Claim("Programs that fail or return another result", "bench/verify", of_failures),
]
