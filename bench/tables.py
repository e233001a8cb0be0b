"""Prints results as tables in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.table import Table

from bench.results import best_peer, grouped, worst
from bench.search import corpus, long_rows
from bench.verify.claims import CLAIMS, Claim, Found


def written(x: float) -> str:
    if math.isinf(x):
        return "NaN"
    return f"{x:.0f}" if x < 1000 else f"10{superscript(math.floor(math.log10(x)))}"


def superscript(n: int) -> str:
    return str(n).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def table(title: str, columns: list[str], rows: Iterable[list[str]], legend: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", caption=legend, caption_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        made.add_row(*row)
    return made


def libraries(lines: list[dict]) -> list[str]:
    return list(dict.fromkeys(line["library"] for line in lines))


FAILURES = {"nan": "NaN", "wrong sign": "with the wrong sign", "zero": "wrongly 0"}  # the name of each counted failure
ALLOCATORS = {"pinned": "if freed memory is kept", "default": "with the C library's default allocator"}


def accuracy(lines: list[dict]) -> Iterable[Table]:
    names = libraries(lines)

    def cell(line):
        if line is None:
            return "–"
        regimes = line["regimes"].values()
        counts = {said: sum(x.get(name, 0) for x in regimes) for name, said in FAILURES.items()}
        told = [f"{n} {said}" for said, n in counts.items() if n] + ([] if line["agrees"] else ["another formula"])
        largest = written(max(worst(x, "beyond") for x in regimes))
        return f"{largest}: {', '.join(told)}" if told else largest

    for dtype in dict.fromkeys(line["dtype"] for line in lines):
        some = [line for line in lines if line["dtype"] == dtype]
        rows = [
            [f"{function}: {quantity}", *(cell(found.get(name)) for name in names)]
            for (function, quantity), found in grouped(some, "function", "quantity").items()
        ]
        legend = (
            "For functions of several logits, errors that come only from rounding x - max x are not counted. After a"
            " colon: how many entries are NaN, have the wrong sign, or are 0 although the exact result isn't."
        )
        yield table(f"Largest error over all kinds of input, in ulps, {dtype}", ["", *names], rows, legend)


def search(lines: list[dict]) -> Iterable[Table]:
    """For each kind of arguments, the largest error over the ways in which kinds of devices sum rows."""
    for arguments in dict.fromkeys(line["arguments"] for line in lines):
        groups: dict[tuple, list[dict]] = {}
        for line in lines:
            if line["arguments"] == arguments and line["worst"]:
                groups.setdefault((line["function"], line["quantity"]), []).append(line)
        rows = []
        for keys, some in groups.items():
            found = max(some, key=lambda line: worst(line["worst"][0], "ulps"))
            rows.append([", ".join(keys), f"{worst(found['worst'][0], 'ulps'):.3g}", found["device"], where(found)])
        legend = (
            "Ulps of the result, or of the sum of the absolute values of its terms. Summed as on: rows were summed here"
            " in the way that jce sums them on this kind of device."
        )
        yield table(
            f"The largest known error, float32, arguments: {arguments}",
            ["", "ulps", "summed as on", "at"],
            rows,
            legend,
        )


def where(line: dict) -> str:
    """The worst argument, abbreviated."""
    at = line["worst"][0]["at"]
    if corpus.is_recipe(at):
        return "; ".join(map(str, long_rows.recipes(at)))

    def short(x):
        if not isinstance(x, list):
            return f"{x:.7g}"
        return f"[{', '.join(f'{y:.4g}' for y in x[:4])}{', …' if len(x) > 4 else ''}]"

    return ", ".join(short(x) for x in at.values())


def speed(lines: list[dict]) -> Iterable[Table]:
    def row(label, found):
        ours, peers = found["jce"], {k: x for k, x in found.items() if k != "jce" and "seconds" in x}
        cells = [
            label,
            f"{1e3 * ours['seconds'][1]:.3g}",
            f"{ours['over_floor'][1]:.2f}",
            f"{ours['compile_seconds']:.2f}",
        ]
        if peers:
            best = min(peers, key=lambda name: peers[name]["seconds"][1])
            compiling = peers[best]["compile_seconds"]
            cells += [best, f"{peers[best]['jce_over_it'][1]:.2f}", f"{compiling:.2f}" if compiling else "–"]
        told = [f"{name} {x['agrees'] or 'disagrees'}" for name, x in found.items() if x["agrees"] is not True]
        return cells + ["–"] * (7 - len(cells)) + [", ".join(told)]

    compiled = [line for line in lines if "over_floor" in line or "shape" in line]
    for malloc in dict.fromkeys(line["malloc"] for line in lines):
        groups = grouped([x for x in compiled if x["malloc"] == malloc], "function", "model", "mode")
        columns = ["", "jce, ms", "/ floor", "compile, s", "fastest other", "jce / it", "compile, s", "failed"]
        rows = [row(", ".join(keys), found) for keys, found in groups.items()]
        legend = (
            "Medians. Floor: a copy of the arrays, or the bare matmuls of a head. It: the fastest other library."
            " Failed: libraries that failed or computed something else."
        )
        yield table(f"Time, {ALLOCATORS[malloc]}", columns, rows, legend)
    eager = [x for x in lines if "shape" not in x and x["malloc"] == lines[0]["malloc"]]
    names = libraries(eager)
    rows = [
        [function, *(f"{1e6 * found[name]['seconds'][1]:.0f}" if name in found else "–" for name in names)]
        for (function,), found in grouped(eager, "function").items()
    ]
    yield table("An eager call on 8 × 10 numbers, µs", ["", *names], rows, "Medians, outside of jit.")


def first_call(lines: list[dict]) -> Iterable[Table]:
    """jce's steps in milliseconds, and their sum divided by that of each other library."""
    names = [name for name in libraries(lines) if name != "jce"]
    columns = ["", "trace, ms", "lower", "compile", "jaxpr, lines", *(f"jce / {name}" for name in names)]
    for device in dict.fromkeys(line["device"] for line in lines):
        rows = []
        for keys, found in grouped([x for x in lines if x["device"] == device], "function", "mode").items():
            ours = found["jce"]
            cells = [f"{1e3 * ours[step]:.0f}" for step in ("trace", "lower", "compile")]
            ratios = [f"{found[name]['jce_over_it']:.2f}" if name in found else "–" for name in names]
            rows.append([", ".join(keys), *cells, str(ours["jaxpr_lines"]), *ratios])
        legend = (
            "Processor time in all threads, the least of several rounds. jce / a library: for the sum of the steps."
        )
        where = "this machine" if device == "here" else f"the {device}"
        yield table(f"Compile time for {where}; nothing runs", columns, rows, legend)


def megabytes(x: float | None) -> str:
    return "can't" if x is None else f"{x / 1e6:,.1f}"


def memory(lines: list[dict]) -> Iterable[Table]:
    names = libraries(lines)
    at_models = grouped([line for line in lines if "temporaries" in line], "function", "model", "mode")
    if at_models:
        rows = [
            [", ".join(keys), *(megabytes(found[name]["temporaries"]) if name in found else "–" for name in names)]
            for keys, found in at_models.items()
        ]
        yield table(
            "Temporary memory for 8,192 tokens, MB",
            ["", *names],
            rows,
            "Without arguments and results. –: the library has no such loss. can't: it doesn't support the mode.",
        )
    yield from growth(lines)


def growth(lines: list[dict]) -> Iterable[Table]:
    names = libraries(lines)
    for key, what in (("time_exponent", "Time"), ("exponent", "Temporary memory")):
        some = [line for line in lines if key in line]
        rows = [
            [
                f"{function}, {mode}, by {along}",
                *(f"{found[name][key]:.2f}" if name in found else "–" for name in names),
            ]
            for (function, mode, along), found in grouped(some, "function", "mode", "along").items()
        ]
        if rows:
            legend = "1: proportional to the size; 0: constant. The benchmark `scale` fits only the last three sizes."
            yield table(f"{what} ~ size^exponent", ["", *names], rows, legend)


def accelerators(lines: list[dict]) -> Iterable[Table]:
    """For each device: jce, the other library with the shortest roofline, and the ratio of their rooflines."""
    columns = ["", "passes", "fastest other", "its", "roofline / floor", "its", "jce / it", "cycles / its", "kernels"]
    for device in dict.fromkeys(line["device"] for line in lines):
        groups = grouped([x for x in lines if x["device"] == device], "function", "model", "mode")
        rows = [accelerators_row(", ".join(keys), found) for keys, found in groups.items()]
        legend = (
            "Passes: how many arrays of logits are read and written. Roofline / floor: the estimated time at the"
            " device's peaks, divided by that of bare matmuls, or of reading arguments and writing results. Its: the"
            " figure of the fastest other library. Can't: libraries that can't be compiled, or whose cost is unknown."
        )
        yield table(f"Compiled for {device}, not timed", [*columns, "temporary MB", "its", "can't"], rows, legend)


def accelerators_row(label: str, found: dict[str, dict]) -> list[str]:
    best = best_peer(found)
    ours, it = found["jce"], found[best] if best else {}

    def cell(line, key, form):
        return form(line[key]) if key in line else "–"

    def ratio(key):
        return f"{ours[key] / it[key]:.2f}" if ours.get(key) and it.get(key) else "–"

    cells = [label, cell(ours, "passes", "{:.3g}".format), best or "–", cell(it, "passes", "{:.3g}".format)]
    cells += [cell(line, "roofline_over_floor", "{:.2f}".format) for line in (ours, it)]
    cells += [ratio("roofline"), ratio("cycles"), cell(ours, "kernels", str)]
    cells += [cell(line, "temporaries", megabytes) for line in (ours, it)]
    return [*cells, ", ".join(name for name, line in found.items() if "cannot" in line)]


def verify(lines: list[dict]) -> Iterable[Table]:
    """A table for each claim, and a table that counts the results within the claims."""
    environment = lines[0]["environment"]
    on = f"On {environment['device']}, JAX {environment['jax']}"
    on += f", {environment['driver']}" if "driver" in environment else ""
    counts = []
    for claim in CLAIMS:
        found = nearest_to_the_claim(claim.found(lines))
        if found:
            yield of_claim(claim, found, on)
        if held := [claim.holds(x) for x in found if x.said is not None]:
            counts.append([claim.text, f"{sum(held)} of {len(held)}"])
    yield table("What holds", ["claim", "holds"], counts, f"{on}.")


def nearest_to_the_claim(found: Iterable[Found]) -> list[Found]:
    """For each function, the finding that is nearest to its claim, or furthest beyond it."""
    worst_of: dict[str, Found] = {}
    for x in found:
        worst_of[x.of] = max(worst_of.get(x.of, x), x, key=lambda x: x.measured / (x.said or 1))
    return list(worst_of.values())


def of_claim(claim: Claim, found: list[Found], on: str) -> Table:
    """The table of a claim, without empty columns."""
    words = {True: "yes", False: "no", None: ""}
    columns = ["function", "claimed", "measured", "holds", "detail"]
    rows = [
        [x.of, "" if x.said is None else f"{x.said:.3g}", f"{x.measured:.3g}", words[claim.holds(x)], x.detail]
        for x in found
    ]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    said = any(x.said is not None for x in found)
    source = f"Claimed in {claim.source}." if said else "Nothing is claimed for this device."
    return table(claim.text, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], f"{source} {on}.")


def moved(changes: list[tuple[dict, str, float, float]]) -> Table:
    def label(line):
        keys = ("function", "library", "dtype", "quantity", "model", "mode", "along", "arguments", "malloc", "device")
        return ", ".join(str(line[key]) for key in keys if line.get(key) is not None)

    rows = [
        [label(line), name, f"{old:.3g}", f"{new:.3g}", f"{new / old:.2f}" if old and math.isfinite(new / old) else "–"]
        for line, name, old, new in changes
    ]
    legend = "Ratio: now divided by before. Noise: 1 % for programs compiled for accelerators, 10 % otherwise."
    return table("Moved beyond the noise", ["", "figure", "before", "now", "ratio"], rows, legend)


TABLES = {
    "accuracy": accuracy,
    "search": search,
    "speed": speed,
    "first-call": first_call,
    "memory": memory,
    "scale": growth,
    "accelerators": accelerators,
    "verify": verify,
}
