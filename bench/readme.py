"""Makes the tables of bench/README.md from the files of results. `python -m bench.readme` writes them into the README.

Each table stands between the comments `<!-- bench: name -->` and `<!-- bench -->`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable

from bench import results
from bench.accelerators import HEAD, HEAD_FUNCTIONS, TWO_HEADS
from bench.engines import GRADIENT, MODES, VALUE
from bench.models import MODELS
from bench.peers import TASKS, Task
from bench.results import grouped
from bench.search import child
from bench.search.corpus import worst as largest
from bench.search.functions import BARS, IN_BLOCKS, LONG, OTHERS, WHOLE
from bench.tables import where

README = pathlib.Path(__file__).parent / "README.md"
DENSE = ("optax, bfloat16 logits", "jax, bfloat16 logits")  # the first of these that exists
BIG = "Llama 3.2 1B"  # the model for two heads
NOTES = {HEAD: "", "linear_map": ", with entropies", TWO_HEADS: ", KL of two"}
CPU, ACCELERATORS = "on a CPU", "as accelerators sum"
BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench -->)", re.DOTALL)


def lines(name: str, on: str = "cpu") -> list[dict]:
    return results.read(results.FOLDER / f"{name}-{on}.jsonl")


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def functions() -> str:
    """jce's largest errors, float32 / float64; and for each number of classes, jce's time divided by the time of the
    fastest other library."""
    models = [model.name for model in MODELS]
    timed = [x for x in lines("speed") if x["malloc"] == "pinned" and "over_floor" in x and x["model"] in models]
    times = grouped(timed, "function", "model", "mode")
    classes = {line["model"]: line["shape"][-1] for line in timed}
    rows = []
    for task in TASKS:
        if not task.note and not task.has_heads:
            ratios = [over_the_fastest(times, task.label, model) for model in classes]
            rows.append([f"`{task.name}`", *errors(task), *ratios])
    return markdown(["", "value", "first derivatives", *(f"{n:,}" for n in classes.values())], rows)


def errors(task: Task) -> list[str]:
    """Errors of the value and of all derivatives; ¹ marks those with a scale in the tests' table."""
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
    """The times of jce's heads and of the fastest other library, divided by the time of bare matmuls. For two heads,
    only one model is shown."""
    heads = [x for x in lines("speed") if x["malloc"] == "pinned" and "over_floor" in x]
    heads = [x for x in heads if x["function"] in (HEAD, TWO_HEADS)]
    groups = grouped(heads, "function", "model", "mode")
    rows = []
    for function, model in dict.fromkeys(group[:2] for group in groups):
        if function == TWO_HEADS and model != BIG:
            continue
        tokens, width, n = groups[function, model, VALUE]["jce"]["shape"]
        cells = [f"{tokens:,} × {width:,}, {n:,} ({model}{NOTES[function]})"]
        for mode in MODES:
            ratios = {library: x["over_floor"][1] for library, x in groups[function, model, mode].items()}
            ours = ratios.pop("jce")
            best = min(ratios, key=lambda library: ratios[library])
            cells.append(f"{ours:.2f} ({best} {ratios[best]:.2f})")
        rows.append(cells)
    return markdown(["tokens × width, classes", *MODES], rows)


def memory() -> str:
    """Temporary memory of heads with big vocabularies, in GB. The manual scan counts as JAX."""
    heads = [x for x in lines("memory") if x["function"] in (HEAD, TWO_HEADS) and "model" in x]
    heads = [x | {"library": x["library"].partition(",")[0]} for x in heads]
    groups = grouped(heads, "function", "model", "mode")
    names = list(dict.fromkeys(line["library"] for line in heads))

    def gigabytes(x):  # 0 if the program is one fusion, whose memory XLA does not count
        return f"{x['temporaries'] / 1e9:.2g}" if x and x["temporaries"] else "–"

    rows = []
    for function, model in ((HEAD, "GPT-2"), (HEAD, BIG), (TWO_HEADS, BIG)):
        found = [groups[function, model, mode] for mode in MODES]
        _, width, n = found[0]["jce"]["shape"]
        cells = [" / ".join(gigabytes(x.get(name)) for x in found) if name in found[0] else "" for name in names]
        rows.append([f"{width:,}, {n:,} ({model}{NOTES[function]})", *cells])
    return markdown(["width, classes", *names], rows)


def accelerators() -> str:
    """Value and gradient of heads: the roofline divided by that of the bare matmuls, and the temporary memory. Then the
    same figures of a dense loss."""
    heads = [x for x in lines("accelerators", "compiled") if x["mode"] == GRADIENT and x["function"] in NOTES]
    groups = grouped(heads, "function", "model", "device")
    devices = list(dict.fromkeys(device for *_, device in groups))

    def cell(x):
        return f"{x['roofline_over_floor']:.2f}, {x['temporaries'] / 1e9:.2g} GB"

    rows = []
    for function, model in dict.fromkeys(group[:2] for group in groups):
        _, width, n = groups[function, model, devices[0]]["jce"]["shape"]
        dense = next(name for name in DENSE if name in HEAD_FUNCTIONS[function])
        pairs = [[groups[function, model, device][name] for name in ("jce", dense)] for device in devices]
        rows.append([f"{width:,}, {n:,}{NOTES[function]}", *(f"{cell(ours)} ({cell(peer)})" for ours, peer in pairs)])
    names = ["H100" if x == "h100" else f"TPU {x.removeprefix('tpu')}" for x in devices]
    return markdown(["width, classes", *names], rows)


def rows() -> str:
    """How many arrays of logits the losses move on accelerators, in each mode; and the smallest numbers of other
    libraries."""
    lines_of_rows = [x for x in lines("accelerators", "compiled") if x["function"] not in NOTES]
    groups = grouped(lines_of_rows, "function", "device", "model", "mode")
    places = [(device, model) for device in ("h100", "v5e") for model in ("ResNet-50", BIG)]
    shapes = {x["model"]: x["shape"][-1] for x in lines_of_rows}
    table = []
    for function in dict.fromkeys(group[0] for group in groups):
        cells = [f"`{function}`"]
        for place in places:
            found = [groups[function, *place, mode] for mode in MODES if (function, *place, mode) in groups]
            ours = " / ".join(f"{of['jce']['passes']:.0f}" for of in found)
            least = " / ".join(
                f"{min(x['passes'] for library, x in of.items() if library != 'jce'):.0f}" for of in found
            )
            cells.append(f"{ours} ({least})" if found else "")
        if any(cells[1:]):
            table.append(cells)
    names = {"h100": "H100", "v5e": "TPU v5e"}
    return markdown(["", *(f"{names[device]}, {shapes[model]:,} classes" for device, model in places)], table)


def first_call() -> str:
    """Seconds of processor time, and their ratio to those of the fastest other library: for the value alone, and for
    value and gradient."""

    def cells(function: str, mode: str) -> list[str]:
        found = groups[function, mode]
        peers = {library: x for library, x in found.items() if library != "jce"}
        best = min(peers, key=lambda library: peers[library]["first_call"])
        return [f"{found['jce']['first_call']:.2f}", f"{peers[best]['jce_over_it']:.1f} ({best})"]

    groups = dict(grouped(lines("first-call"), "function", "mode").items())
    functions = dict.fromkeys(function for function, _ in groups)
    table = [[f"`{function}`", *cells(function, VALUE), *cells(function, GRADIENT)] for function in functions]
    ratio = "÷ fastest other library"
    titles = ("value, seconds", ratio, "with gradient, seconds", ratio)
    return markdown(["", *titles], table)


def search() -> str:
    """The largest known errors for single numbers and rows of few classes, and the argument of the largest on a CPU."""

    def column(line):
        if classes(line):
            return ""
        device = CPU if line["device"] == "CPU" else ACCELERATORS
        return f"{child.OFF_GRID}, {device}" if line["arguments"] == child.OFF_GRID else device

    found = largest_errors(column)
    columns = [CPU, ACCELERATORS, f"{child.OFF_GRID}, {CPU}", f"{child.OFF_GRID}, {ACCELERATORS}"]
    rows = {keys: cells for keys, of in found.items() if any(cells := ulps(of, columns))}
    at = {keys: where(found[keys][CPU]) if CPU in found[keys] else "" for keys in rows}
    table = [[f"`{keys[0]}`", keys[1], *cells, at[keys]] for keys, cells in rows.items()]
    return markdown(["function", "quantity", *columns, "largest on a CPU at"], table)


def bars() -> str:
    """The bounds in the tests: ulps of a value / a first derivative."""
    tail = "log_probs_with_integer_labels, tail"
    named = [
        ("single numbers, and rows of 2 to 16 classes", "rows"),
        ("… KL and generalized KL", "kl_divergence"),
        ("… Jensen–Shannon", "jensen_shannon_divergence"),
        ("… a tail's log-probability", tail),
        ("rows of 1,000 to 32,768 classes", WHOLE),
        ("… a tail's log-probability", f"{tail}, {WHOLE}"),
        ("rows of 50,257 to 262,144 classes", IN_BLOCKS),
        ("… a tail's log-probability", f"{tail}, {IN_BLOCKS}"),
    ]
    rows = []
    for name, key in named:
        on_cpu = BARS[key][:2]
        others = "not searched" if key.endswith((WHOLE, IN_BLOCKS)) else told(OTHERS * bar for bar in on_cpu)
        rows.append([name, told(on_cpu), others])
    return markdown(["bounds in ulps, value / first derivative", CPU, ACCELERATORS], rows)


def told(bars: Iterable[float]) -> str:
    return " / ".join(f"{bar:g}" for bar in bars)


def long_rows() -> str:
    """The largest known errors for rows of many classes, on a CPU."""
    columns = [f"{n:,} classes" for n in LONG]
    found = largest_errors(classes)
    table = [[f"`{function}`", quantity, *ulps(of, columns)] for (function, quantity), of in found.items()]
    return markdown(["function", "quantity", *columns], [row for row in table if any(row[2:])])


def classes(line: dict) -> str:
    """The number of classes, for rows of many classes."""
    return line["arguments"].removesuffix(", structured") if "classes" in line["arguments"] else ""


def largest_errors(column: Callable[[dict], str]) -> dict[tuple, dict[str, dict]]:
    """By function and quantity, and then by column, the line with the largest error."""
    groups: dict[tuple, dict[str, dict]] = {}
    for line in filter(lambda line: line["worst"], lines("search")):
        found = groups.setdefault((line["function"], line["quantity"]), {})
        found[column(line)] = max(found.get(column(line), line), line, key=largest)
    return groups


def ulps(found: dict[str, dict], columns: list[str]) -> list[str]:
    return [f"{largest(found[column]):.3g}" if column in found else "" for column in columns]


TABLES = {
    "accelerators": accelerators,
    "functions": functions,
    "floor": floor,
    "memory": memory,
    "rows": rows,
    "first_call": first_call,
    "bars": bars,
    "search": search,
    "long_rows": long_rows,
}


def rendered(text: str) -> str:
    """The text with tables made from the results."""
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
