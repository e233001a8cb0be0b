"""The largest error that a search finds of each function, in float32, and the argument that has it.

A maximum over some thousand samples isn't the largest error there is: over millions, climbing from the worst, errors
are 2 to 4 times those. A line for each function, quantity, kind of arguments and kind of device, each of which sums
rows its own way: the worst few arguments that are known, from which the next search begins, so that an error that was
found once is tried again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from bench import children, results
from bench.search.corpus import worst
from bench.search.floats import DIVISION, ELEMENTARY
from bench.search.functions import ALL

DEVICES = ("CPU", "TPU", "GPU")
QUICK_ON_OTHERS = ("cross_entropy_with_integer_labels", "entropy_with_logits")
PUBLISHED = results.FOLDER / "search-cpu.jsonl"
SECONDS = 30.0
NAMES = [searched.label for searched in ALL] + [elementary.label for elementary in ELEMENTARY] + [DIVISION]


class Part(NamedTuple):
    """A part of the search, in a process of its own."""

    device: str
    long: bool
    functions: list[str]


def parts(quick: bool, only: str, long_rows: bool) -> list[Part]:
    """Only sums of rows differ between devices. Long rows are searched as a CPU sums them: this CPU would add the
    numbers of an accelerator's row one after another, which says nothing about an accelerator."""
    of_rows = [searched.label for searched in ALL if searched.kernel.has_classes]
    on_others = [label for label in of_rows if label in QUICK_ON_OTHERS or not quick]
    long = [searched.label for searched in ALL if searched.long and searched.label in on_others]
    some = [Part(device, False, NAMES if device == "CPU" else on_others) for device in DEVICES]
    some = [Part("CPU", True, long)] if long_rows else [*some, Part("CPU", True, long)]
    kept = [part._replace(functions=[label for label in part.functions if only in label]) for part in some]
    return [part for part in kept if part.functions]


def run(
    quick: bool,
    only: str = "",
    seconds: float = SECONDS,
    seed: int = 0,
    known: tuple[str, ...] = (),
    long_rows: bool = False,
) -> Iterator[tuple[str, list[dict]]]:
    """A label of what was searched, and its lines; at first the number of them all as a label.

    So many seconds for each function as each device sums rows, and as many for its long rows, all its quantities
    together, but a few batches when quick. It goes on from the arguments of the first file of `known` that there is.
    With `long_rows` it searches long rows alone.
    """
    todo = parts(quick, only, long_rows)
    yield str(sum(len(part.functions) for part in todo)), []
    for part in todo:
        what = part._asdict() | {"quick": quick, "seconds": seconds, "seed": seed}
        what["known"] = [*known, str(PUBLISHED)]
        yield from children.lines("bench.search.child", what, dict(os.environ))


def check(lines: list[dict]) -> None:
    """Every error is within its bar, and is what mpmath says that it is."""
    by_label = {searched.label: searched for searched in ALL}
    ours = [line for line in lines if line["library"] == "jce"]
    for line in ours:
        for x in line["worst"]:
            same = math.isclose(x["ulps"], x.get("by_mpmath", x["ulps"]), rel_tol=0.01, abs_tol=0.01)
            assert same, (line["function"], line["quantity"], x)
    bars = [by_label[x["function"]].bar(x["quantity"], x["arguments"], x["device"] == "CPU") for x in ours]
    missed = [x for x, bar in zip(ours, bars, strict=True) if worst(x) > bar]
    assert not missed, [(x["function"], x["quantity"], x["arguments"], x["device"], worst(x)) for x in missed]
