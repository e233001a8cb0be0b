"""Pictures of the results: a heat map of errors, growth on logarithmic axes, and rooflines on accelerators."""

from __future__ import annotations

import math
import pathlib

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import BoundaryNorm, ListedColormap

from bench.engines import GRADIENT
from bench.results import best_peer, grouped, worst
from bench.tables import written

EXACT, USABLE, WRONG = 5, 100, 1e5  # ulps; from 1.7e7 ulps on, no digit of a float32 is correct
PANELS = [
    ("cross_entropy_with_integer_labels", "value", "label loss"),
    ("cross_entropy_with_integer_labels", "∂logits", "gradient of the label loss"),
    ("kl_divergence_with_logits", "value", "KL divergence of two rows of logits"),
    ("binary_kl_divergence", "value", "KL divergence of two probabilities"),
]
COLOURS = ["#2c7fb8", "#a6d9e4", "#fed98e", "#fe9929", "#cc4c02"]


def accuracy(lines: list[dict], path: pathlib.Path) -> None:
    """Draws the largest float32 errors of some functions, with libraries as rows and kinds of input as columns."""
    panels = []
    for function, quantity, title in PANELS:
        chosen = {
            line["library"]: line["regimes"]
            for line in lines
            if (line["function"], line["quantity"], line["dtype"]) == (function, quantity, "float32") and line["agrees"]
        }
        if chosen:
            panels.append((title, chosen))
    if not panels:
        return
    heights = [len(rows) for _, rows in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(13, 0.36 * sum(heights) + 1.25 * len(panels)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    levels = BoundaryNorm([0, EXACT, USABLE, WRONG, 1e7, math.inf], len(COLOURS))
    for ax, (title, rows) in zip(axes[:, 0], panels, strict=True):
        regimes = list(next(iter(rows.values())))
        table = np.array([[worst(rows[library][regime], "beyond") for regime in regimes] for library in rows])
        ax.pcolormesh(
            np.minimum(table, 1e300), cmap=ListedColormap(COLOURS), norm=levels, edgecolors="white", linewidth=1
        )
        for (i, j), x in np.ndenumerate(table):
            ax.text(j + 0.5, i + 0.5, written(x), ha="center", va="center", fontsize=7.5)
        ax.set_xticks(np.arange(len(regimes)) + 0.5, regimes, rotation=30, ha="right", fontsize=7.5)
        ax.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=9)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.suptitle(
        "Largest float32 error, in ulps of the exact result. From 10⁷ ulps on, no digit is correct.\n"
        "For logits x, the error that comes only from rounding x - max x before its exponential is not counted.",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def growth(lines: list[dict], path: pathlib.Path) -> None:
    """Draws temporary memory, and times if there are any, against the number of tokens and of classes."""
    lines = [line for line in lines if "grown" in line or "seconds_at" in line]
    lines = [line for line in lines if line["mode"] == GRADIENT]
    kinds = [
        (key, name)
        for key, name in (("grown", "temporary memory, bytes"), ("seconds_at", "seconds"))
        if any(key in line for line in lines)
    ]
    panels = list(dict.fromkeys((line["function"], line["along"]) for line in lines))
    if not panels:
        return
    figure, axes = pyplot.subplots(
        len(kinds), len(panels), figsize=(3.6 * len(panels), 3.2 * len(kinds)), squeeze=False, layout="constrained"
    )
    libraries = list(dict.fromkeys(line["library"] for line in lines))
    for column, (function, along) in enumerate(panels):
        for row, (key, name) in enumerate(kinds):
            ax = axes[row, column]
            for line in lines:
                if (line["function"], line["along"]) == (function, along) and key in line:
                    slope = line["exponent" if key == "grown" else "time_exponent"]
                    ours = line["library"] == "jce"
                    ax.loglog(
                        line["sizes"],
                        np.maximum(line[key], 1e3 if key == "grown" else 0),
                        "o-" if ours else ".--",
                        color=f"C{libraries.index(line['library'])}",
                        linewidth=2 if ours else 1,
                        label=f"{line['library']} ~ size^{slope:g}",
                    )
            ax.set_title(function, fontsize=8)
            ax.set_xlabel(along)
            ax.set_ylabel(name if column == 0 else "")
            ax.legend(fontsize=6.5)
            ax.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def accelerators(lines: list[dict], path: pathlib.Path) -> None:
    """Draws the estimated time of value and gradient on each device, once for heads and once for losses of rows."""
    lines = [line for line in lines if line["mode"] == GRADIENT]
    for kind, some in (
        ("heads", [line for line in lines if len(line["shape"]) == 3]),
        ("losses", [line for line in lines if len(line["shape"]) == 2 and line["shape"][1] >= 1000]),
    ):
        if some:
            beside_the_best_peer(some, path.with_stem(f"{path.stem}-{kind}"), f"Value and gradient of {kind}")


def beside_the_best_peer(lines: list[dict], path: pathlib.Path, title: str) -> None:
    """Draws the rooflines of jce and of the fastest other library, divided by the floor.

    Each panel is a device. Each row is a function and a size.
    """
    devices = list(dict.fromkeys(line["device"] for line in lines))
    sizes = {line["model"]: " × ".join(f"{n:,}" for n in line["shape"][1:]) for line in lines}
    rows = list(dict.fromkeys((line["function"], line["model"]) for line in lines))
    figure, axes = pyplot.subplots(
        1,
        len(devices),
        figsize=(4 + 2.4 * len(devices), 1.2 + 0.24 * len(rows)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, device in zip(axes[0], devices, strict=True):
        groups = grouped([x for x in lines if x["device"] == device], "function", "model")
        for y, row in enumerate(rows):
            found = groups.get(row, {})
            shown = [found.get("jce", {}), found.get(best_peer(found), {})]
            points = [line["roofline_over_floor"] for line in shown if "roofline" in line]
            ax.plot(points, [y] * len(points), color="lightgrey", zorder=0)
            for line, marker, colour in zip(shown, "o|", (COLOURS[0], COLOURS[-1]), strict=True):
                ax.plot(line.get("roofline_over_floor", math.nan), y, marker, color=colour, markersize=8)
        ax.set_xscale("log")
        ax.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
        ax.minorticks_off()
        ax.axvline(1, color="black", linewidth=0.5)
        ax.set_title(device, loc="left", fontsize=11, fontweight="bold")
        ax.set_yticks(range(len(rows)), [f"{function}, {sizes[model]}" for function, model in rows], fontsize=9)
        ax.set_ylim(len(rows), -1)
        ax.grid(alpha=0.3)
    figure.suptitle(
        f"{title}: estimated time (not measured) / least possible time;   ● jce   | the fastest other library",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


PICTURES = {"accuracy": accuracy, "memory": growth, "scale": growth, "accelerators": accelerators}
