"""Checks on this device what the READMEs claim: `python -m bench verify`, mainly for GPUs and TPUs.

The functions run on the device, and their errors are measured against float64 on the host's CPU. Each function runs
at the arguments with the largest known errors, at about 10,000 other rows or 100,000 other numbers, and at the edge
cases of the tests' table. The errors of XLA's own functions and of heads are measured too. A head's time and memory are
measured in bfloat16 on an accelerator and in float32 on a CPU, and its time is compared with that of its matmuls alone.
A loss's time is compared with optax's. `CLAIMS` lists each claim and how it is checked.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bench import speed
from bench.accelerators import HEAD
from bench.search import floats
from bench.search.functions import ALL
from bench.search.judging import on_host
from bench.verify.claims import CLAIMS, of_cpu
from bench.verify.errors import corner_errors, elementary_errors, function_errors, long_row_errors
from bench.verify.heads import LOSSES_OF_HEADS, head_errors
from bench.verify.times import temporaries, timed
from tests.kernels import ROWS

TO_SEND = "To share these results with the project, attach this file to an issue"
QUICK = ("cross_entropy_with_integer_labels", "binary_kl_divergence", "kl_divergence_with_logits", HEAD)


def file_name() -> str:
    """The device's name, with characters that are safe in file names."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


class Case(NamedTuple):
    function: str
    label: str
    measure: Callable[[], list[dict]]


def cases(quick: bool) -> list[Case]:
    kept = [searched for searched in ALL if not quick or searched.label in QUICK]
    found = [Case(x.label, f"errors of {x.label}", functools.partial(function_errors, x)) for x in kept]
    long = [searched for searched in ALL if searched.long and not quick]
    found += [Case(x.label, f"errors of {x.label} in long rows", functools.partial(long_row_errors, x)) for x in long]
    elementary = [floats.DIVISION, *(x.label for x in floats.ELEMENTARY)]
    found += [Case(x, f"errors of {x}", functools.partial(elementary_errors, x)) for x in elementary]
    rows = [label for label in ROWS if not quick or label in QUICK]
    found += [Case(x, f"edge cases of {x}", functools.partial(corner_errors, x)) for x in rows]
    heads = [name for name in LOSSES_OF_HEADS if not quick or name == HEAD]
    found += [Case(x, f"heads, {x}", functools.partial(head_errors, x)) for x in heads]
    found.append(Case(HEAD, f"heads, {HEAD}, bfloat16", functools.partial(head_errors, HEAD, jnp.bfloat16)))
    platform = jax.default_backend()
    if platform == "cpu":
        found.append(Case(HEAD, f"temporary memory of {HEAD}", temporaries))
    some = timed(quick, platform)
    return found + [Case(x.task.label, f"times of {x.label}", functools.partial(speed.measure, *x)) for x in some]


def host_is_there() -> None:
    try:
        with on_host():
            pass
    except RuntimeError:
        kind, platforms = jax.devices()[0].device_kind, jax.config.jax_platforms
        told = f"python -m bench verify needs JAX's CPU platform for float64, besides the device, {kind}"
        print(f"{told}: JAX_PLATFORMS={platforms} hides it; set it to {platforms},cpu", file=sys.stderr)
        raise SystemExit(2) from None


def run(quick: bool, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields a label and the result lines for each measurement. The first label is the number of measurements."""
    host_is_there()
    todo = [case for case in cases(quick) if only in case.function]
    yield str(len(todo)), []
    for case in todo:
        try:
            lines = case.measure()
        except RuntimeError as error:  # for example too little memory: the other cases still run
            lines = [{"function": case.function, "library": "jce", "quantity": case.label, "cannot": str(error)[:500]}]
        yield case.label, lines


def check(lines: list[dict]) -> None:
    """Checks the claims that don't depend on the machine. This is done only on a CPU, where they were measured."""
    missed = [
        f"{claim.text}: {found.of} {found.measured:.3g}, claimed {found.said:.3g}"
        for claim in CLAIMS
        if of_cpu(lines[0]) and not claim.of_machine
        for found in claim.found(lines)
        if claim.holds(found) is False
    ]
    assert not missed, missed
