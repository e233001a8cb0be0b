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

from bench import children, results
from bench.search.corpus import worst
from bench.search.floats import DIVISION, ELEMENTARY
from bench.search.functions import ALL

DEVICES = ("CPU", "TPU", "GPU")
QUICK_ON_OTHERS = ("cross_entropy_with_integer_labels", "entropy_with_logits")
PUBLISHED = results.FOLDER / "search-cpu.jsonl"
SECONDS = 30.0
NAMES = [searched.label for searched in ALL] + [elementary.label for elementary in ELEMENTARY] + [DIVISION]


def todo(quick: bool, only: str) -> dict[str, list[str]]:
    """By device, of which functions: only sums of rows differ between devices."""
    of_rows = [searched.label for searched in ALL if searched.kernel.has_classes]
    on_others = [label for label in of_rows if label in QUICK_ON_OTHERS or not quick]
    functions = {device: NAMES if device == "CPU" else on_others for device in DEVICES}
    return {device: [label for label in some if only in label] for device, some in functions.items()}


def run(
    quick: bool, only: str = "", seconds: float = SECONDS, seed: int = 0, known: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[dict]]]:
    """A label of what was searched, and its lines; at first the number of them all as a label.

    So many seconds for each function as each device sums rows, all its quantities together, but a few batches when
    quick. It goes on from the arguments of the first file of `known` that there is.
    """
    functions = todo(quick, only)
    yield str(sum(map(len, functions.values()))), []
    for device, some in functions.items():
        if some:
            what = {"device": device, "functions": some, "quick": quick, "seconds": seconds, "seed": seed}
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
