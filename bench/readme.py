"""The README's figures, from the files of results: `python -m bench.readme` writes them into it.

Each table stands between the comments `<!-- bench: name -->` and `<!-- bench -->`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable

from bench import results
from bench.accelerators import HEAD
from bench.engines import GRADIENT, MODES, VALUE
from bench.peers import TASKS, Task
from bench.results import grouped

README = pathlib.Path(__file__).parents[1] / "README.md"
DENSE = "optax, bfloat16 logits"
BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench -->)", re.DOTALL)


def lines(name: str, on: str = "cpu") -> list[dict]:
    return results.read(results.FOLDER / f"{name}-{on}.jsonl")


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def functions() -> str:
    """jce's largest errors, float32 / float64, and its time over the fastest peer's at each number of classes."""
    timed = [x for x in lines("speed") if x["malloc"] == "pinned" and "over_floor" in x]
    times = grouped(timed, "function", "model", "mode")
    classes = {line["model"]: line["shape"][-1] for line in timed}
    rows = []
    for task in TASKS:
        if not task.note and task.kind != "head":
            ratios = [over_the_fastest(times, task.label, model) for model in classes]
            rows.append([f"`{task.name}`", *errors(task), *ratios])
    return markdown(["", "value", "first derivatives", *(f"{n:,}" for n in classes.values())], rows)


def errors(task: Task) -> list[str]:
    """Of the value and of all derivatives; ¹ where the tests' table gives a scale."""
    found: dict[str, dict[str, float]] = {}
    for line in lines("accuracy"):
        if (line["library"], line["function"]) == ("jce", task.label):
            worst = max(x["beyond"] for x in line["regimes"].values())
            found.setdefault(line["quantity"], {})[line["dtype"]] = worst
    scaled = [task.kernel.value_scale, *task.kernel.gradient_scale]

    def cell(quantity, scale):
        return f"{found[quantity]['float32']:.1f} / {found[quantity]['float64']:.1f}{' ¹' if scale else ''}"

    names = zip(task.kernel.arguments, scaled[1:], strict=False)
    return [cell("value", scaled[0]), ", ".join(f"∂{name} {cell(f'∂{name}', scale)}" for name, scale in names)]


def over_the_fastest(times: dict, label: str, model: str) -> str:
    if (label, model, VALUE) not in times:
        return ""
    ratios = []
    for mode in MODES:
        peers = [x for library, x in times[label, model, mode].items() if library != "jce"]
        ratios.append(f"{min(peers, key=lambda x: x['seconds'][1])['jce_over_it'][1]:.2g}" if peers else "–")
    return " / ".join(ratios)


def floor() -> str:
    """The head's time over its bare matrix products, and the fastest peer's."""
    head = [x for x in lines("speed") if x["function"] == "linear_cross_entropy" and "over_floor" in x]
    groups = grouped([x for x in head if x["malloc"] == "pinned"], "model", "mode")
    rows = []
    for model in dict.fromkeys(model for model, _ in groups):
        tokens, width, n = groups[model, VALUE]["jce"]["shape"]
        cells = [f"{tokens:,} × {width:,}, {n:,} ({model})"]
        for mode in MODES:
            ratios = {library: x["over_floor"][1] for library, x in groups[model, mode].items()}
            ours = ratios.pop("jce")
            best = min(ratios, key=lambda library: ratios[library])
            cells.append(f"{ours:.2f} ({best} {ratios[best]:.2f})")
        rows.append(cells)
    return markdown(["tokens × width, classes", *MODES], rows)


def memory() -> str:
    """The head's temporaries at big vocabularies, in GB."""
    head = [x for x in lines("memory") if x["function"] == "linear_cross_entropy" and "model" in x]
    groups = grouped(head, "model", "mode")
    names = list(dict.fromkeys(line["library"] for line in head))

    def gigabytes(x):
        return "–" if x is None else f"{x / 1e9:.2g}"

    rows = []
    for model in ("GPT-2", "Llama 3.2 1B"):
        _, width, n = groups[model, VALUE]["jce"]["shape"]
        found = [" / ".join(gigabytes(groups[model, mode][name]["temporaries"]) for mode in MODES) for name in names]
        rows.append([f"{width:,}, {n:,} ({model})", *found])
    return markdown(["width, classes", *names], rows)


def accelerators() -> str:
    """The head's value and gradient, over its bare products by the roofline, and its temporaries; and optax's."""
    head = [x for x in lines("accelerators", "compiled") if x["mode"] == GRADIENT and x["function"] == HEAD]
    groups = grouped(head, "model", "device")
    devices = list(dict.fromkeys(device for _, device in groups))

    def cell(x):
        return f"{x['roofline_over_floor']:.2f}, {x['temporaries'] / 1e9:.2g} GB"

    rows = []
    for model in dict.fromkeys(model for model, _ in groups):
        _, width, n = groups[model, devices[0]]["jce"]["shape"]
        pairs = [[groups[model, device][name] for name in ("jce", DENSE)] for device in devices]
        rows.append([f"{width:,}, {n:,}", *(f"{cell(ours)} ({cell(peer)})" for ours, peer in pairs)])
    names = ["H100" if x == "h100" else f"TPU {x.removeprefix('tpu')}" for x in devices]
    return markdown(["width, classes", *names], rows)


TABLES = {"accelerators": accelerators, "functions": functions, "floor": floor, "memory": memory}


def rendered(text: str) -> str:
    """The README with its tables as the results have them."""
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
