"""The worst-case error search: the largest float32 error found for each function, and the arguments that cause it.

The maximum over a few thousand samples underestimates the largest error. A search over millions of samples that climbs
from the worst ones finds errors 2 to 4 times as large. The results have one line for each function, quantity, kind of
arguments and kind of device, because each kind of device sums rows in its own way. A line holds the few worst known
arguments. The next search begins from them, so an error that was found once is always tried again.
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
    """A part of the search, which runs in its own process."""

    device: str
    long: bool
    functions: list[str]


def parts(quick: bool, only: str, long_rows: bool) -> list[Part]:
    """The parts to run. Devices differ only in how they sum rows, so only functions of rows are searched for each.

    Long rows are searched only with a CPU's sums: for an accelerator's program, this CPU would add the numbers of a row
    one after another, which says nothing about an accelerator.
    """
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
    """Yields a label and the result lines for each search. The first label is the number of searches.

    Each function is searched for `seconds` per kind of device, and for another `seconds` in its long rows, with all
    its quantities together. With `quick` a search takes only a few batches. A search begins from the arguments in the
    first file of `known` that exists. With `long_rows` only long rows are searched.
    """
    todo = parts(quick, only, long_rows)
    yield str(sum(len(part.functions) for part in todo)), []
    for part in todo:
        what = part._asdict() | {"quick": quick, "seconds": seconds, "seed": seed}
        what["known"] = [*known, str(PUBLISHED)]
        yield from children.lines("bench.search.child", what, dict(os.environ))


def check(lines: list[dict]) -> None:
    """Checks that every error is within its bar, and that mpmath confirms it."""
    by_label = {searched.label: searched for searched in ALL}
    ours = [line for line in lines if line["library"] == "jce"]
    for line in ours:
        for x in line["worst"]:
            same = math.isclose(x["ulps"], x.get("by_mpmath", x["ulps"]), rel_tol=0.01, abs_tol=0.01)
            assert same, (line["function"], line["quantity"], x)
    bars = [by_label[x["function"]].bar(x["quantity"], x["arguments"], x["device"] == "CPU") for x in ours]
    missed = [x for x, bar in zip(ours, bars, strict=True) if worst(x) > bar]
    assert not missed, [(x["function"], x["quantity"], x["arguments"], x["device"], worst(x)) for x in missed]
