"""Arguments as result lines store them. A later search begins from them, and a test tries them again."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np

from bench import results
from bench.search.functions import HVP, Searched

KEPT, KEPT_OF_MANY = 3, 1  # points per quantity
DIRECTION = "direction of "


def stored(x: np.ndarray) -> float | list[float]:
    """The shortest decimal numbers that read back as these floats."""

    def number(value: np.float32) -> float:
        short = float(str(value))
        return short if np.float32(short) == value else float(value)

    return [number(value) for value in x] if np.ndim(x) else number(np.float32(x))


def names(searched: Searched) -> list[str]:
    arguments = list(searched.kernel.arguments)
    return arguments + [DIRECTION + name for name in arguments if searched.hvp]


def told(searched: Searched, quantity: str, point: list[np.ndarray]) -> dict:
    """The arrays of a point by name. Directions are included only for an HVP."""
    pairs = zip(names(searched), point, strict=True)
    return {name: stored(x) for name, x in pairs if quantity.startswith(HVP) or not name.startswith(DIRECTION)}


def point(searched: Searched, at: dict) -> list[np.ndarray]:
    """The inverse of `told`. A missing direction is 0."""
    first = np.array(at[searched.kernel.arguments[0]], np.float32)
    return [np.array(at[name], np.float32) if name in at else np.zeros_like(first) for name in names(searched)]


def points(searched: Searched, lines: Iterable[dict]) -> list[tuple[dict, list[np.ndarray]]]:
    """The function's points that are stored as numbers, each with its result line."""
    lines = [line for line in lines if line["function"] == searched.label]
    return [(x, point(searched, of["at"])) for x in lines for of in x["worst"] if not is_recipe(of["at"])]


def is_recipe(at: dict) -> bool:
    """Whether the arguments are stored as recipes (`long_rows.py`)."""
    return any(isinstance(x, dict) for x in at.values())


def read(paths: Iterable[pathlib.Path]) -> list[dict]:
    """The search's lines in the first of these files that exists."""
    for path in paths:
        if path.exists():
            return [line for line in results.read(path) if line["bench"] == "search"]
    return []


def worst(line: dict) -> float:
    """The largest known error in this line."""
    return max((results.worst(x, "ulps") for x in line["worst"]), default=0.0)
