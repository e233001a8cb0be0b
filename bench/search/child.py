"""A process that searches, under x64, with the row sums of one kind of device: `python -m bench.search.child JSON`."""

from __future__ import annotations

import pathlib

import jax
import mpmath as mp
import numpy as np

from bench import children
from bench.search import climb, corpus, floats, long_rows
from bench.search.functions import ALL, FEW, HVP, MANY, VALUE, Searched, structured
from bench.search.judging import by_mpmath, judged
from jce._jax import platforms as _platforms

ON_GRID, OFF_GRID, THOUSAND, ANY, ALL_FLOATS = "on the grid", "off the grid", "1,000 classes", "any", "every float"
QUICK_CLASSES, QUICK_BATCHES = (3,), 4


def classes(searched: Searched, todo: dict, known: list) -> list[int]:
    """The numbers of classes to search, including those of earlier searches. With an accelerator's sums, rows of 1,000
    classes are not searched: an accelerator sums a row in parts, but this CPU would sum its numbers one by one, which
    says nothing about the accelerator."""
    if not searched.kernel.has_classes:
        return [1]
    if todo["quick"]:
        return list(QUICK_CLASSES)
    every = {len(point[0]) for _, point in known} | set(FEW) | ({MANY} if searched.many else set())
    return sorted(every if todo["device"] == "CPU" else every - {MANY})


def kind(search: climb.Search) -> str:
    """The kind of the search's arguments, as written in a result line."""
    if not search.searched.of_logits:
        return ANY
    return OFF_GRID if search.off_grid else THOUSAND if search.shape[-1] == MANY else ON_GRID


def fits(search: climb.Search, line: dict, point: list[np.ndarray]) -> bool:
    same_classes = not search.searched.kernel.has_classes or len(point[0]) == search.shape[-1]
    return line["arguments"] == kind(search) and same_classes


def climbed(searched: Searched, todo: dict, lines: list[dict]) -> list[climb.Search]:
    """Searches rows of each number of classes, on the grid and off it, from the points that earlier searches found."""
    known, done = corpus.points(searched, lines), []
    every = classes(searched, todo, known)
    for n in every:
        off_grids = [False, True] if searched.of_logits and n != MANY else [False]
        some = [climb.Search(searched, n, off_grid, todo["seed"]) for off_grid in off_grids]
        for search in some:
            of_this = [point for line, point in known if fits(search, line, point)]
            search.begin(of_this) if of_this else search.step()
        climb.run(some, todo["seconds"] / len(every), QUICK_BATCHES if todo["quick"] else 10**9)
        done += some
    return done


def tried_again(search: climb.Search, quantity: str, point: list[np.ndarray]) -> dict:
    """A point and its error, measured again in a separate batch, and also by mpmath if that isn't too slow."""
    searched, k = search.searched, len(search.searched.kernel.arguments)
    batch = [np.broadcast_to(x, search.shape) for x in point]
    found = judged(searched, batch[:k], batch[k:], search.off_grid)[quantity]
    row = int(np.argmax(found.of_rows))
    errors, got, ulp, beyond = (
        np.atleast_1d(np.broadcast_to(x, found.got.shape)[row])
        for x in (found.errors, found.got, found.ulp, found.beyond)
    )
    place = int(np.argmax(errors))
    told = {"ulps": rounded(errors[place]), "at": corpus.told(searched, quantity, point)}
    if search.shape[-1] != MANY or not quantity.startswith(HVP):  # mpmath would take a million differences
        exact = by_mpmath(searched, quantity, point, place)
        if mp.isfinite(exact):  # a difference across the domain's edge isn't finite
            error = float(abs(float(got[place]) - exact)) / ulp[place]
            told["by_mpmath"] = rounded(max(0.0, error - beyond[place]))
    return told


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def lines_of(searched: Searched, todo: dict, lines: list[dict]) -> list[dict]:
    """The result lines: the worst points for each quantity and kind of arguments."""
    if searched.one_number:
        return lines_of_floats(searched, todo, lines)
    found: dict[tuple[str, str], list] = {}
    for search in climbed(searched, todo, lines):
        for quantity, worst in search.worst.items():
            if not (search.off_grid and quantity.startswith(HVP)):
                some = [(error, search, point) for error, point in worst.ordered()[: corpus.KEPT]]
                found.setdefault((quantity, kind(search)), []).extend(some)
    made = []
    for (quantity, arguments), some in found.items():
        kept = corpus.KEPT_OF_MANY if arguments == THOUSAND else corpus.KEPT
        some = sorted(some, key=lambda x: -x[0])[:kept]
        worst = [tried_again(search, quantity, point) for _, search, point in some]
        made.append(line(searched, quantity, arguments, todo["device"], worst))
    return made


def stride(todo: dict) -> int:
    return floats.STRIDE if todo["quick"] or not todo["seconds"] else 1


def lines_of_floats(searched: Searched, todo: dict, lines: list[dict]) -> list[dict]:
    known = [point[0] for _, point in corpus.points(searched, lines)]
    worst, made = floats.over_all(searched, stride(todo), known), []
    search = climb.Search(searched, 1, False, 0)
    for quantity, of in worst.items():
        some = [tried_again(search, quantity, point) for _, point in of.ordered()[: corpus.KEPT]]
        made.append(line(searched, quantity, ALL_FLOATS, todo["device"], some))
    return made


def line(searched: Searched, quantity: str, arguments: str, device: str, worst: list[dict]) -> dict:
    return {
        "function": searched.label,
        "library": "jce",
        "dtype": "float32",
        "quantity": quantity,
        "arguments": arguments,
        "device": device,
        "worst": sorted(worst, key=lambda x: -x["ulps"]),
    }


def lines_of_long_rows(searched: Searched, todo: dict, lines: list[dict]) -> list[dict]:
    made = []
    for search in long_rows.searches(searched, todo, lines):
        for quantity, found in search.worst.items():
            worst = [
                {"ulps": rounded(error), "at": long_rows.told(searched, point)}
                for error, point in found[: corpus.KEPT_OF_MANY]
            ]
            made.append(line(searched, quantity, structured(search.classes), todo["device"], worst))
    return made


def lines_of_elementary(label: str, todo: dict, lines: list[dict]) -> list[dict]:
    """The result lines of XLA's own functions."""
    if label == floats.DIVISION:
        names, worst = ["dividend", "divisor"], floats.of_division(1 if todo["quick"] else 200, todo["seed"])
    else:
        (elementary,) = (x for x in floats.ELEMENTARY if x.label == label)
        known = [point["at"]["x"] for line in lines if line["function"] == label for point in line["worst"]]
        names, worst = ["x"], floats.of_elementary(elementary, stride(todo), known)
    points = [
        {"ulps": rounded(error), "at": dict(zip(names, map(corpus.stored, point), strict=True))}
        for error, point in worst.ordered()[: corpus.KEPT]
    ]
    arguments = ANY if label == floats.DIVISION else ALL_FLOATS
    of = {"function": label, "library": "jax", "dtype": "float32", "quantity": VALUE, "device": todo["device"]}
    return [of | {"arguments": arguments, "worst": points}]


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    todo = children.todo()
    _platforms.CPU = getattr(_platforms, todo["device"])
    known = corpus.read(map(pathlib.Path, todo["known"]))
    by_label = {searched.label: searched for searched in ALL}
    for label in todo["functions"]:
        searched = by_label.get(label)
        of = lines_of_long_rows if todo["long"] else lines_of
        lines = of(searched, todo, known) if searched else lines_of_elementary(label, todo, known)
        children.tell(f"{label}, {'long rows' if todo['long'] else todo['device']}", lines)


if __name__ == "__main__":
    main()
