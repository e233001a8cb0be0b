"""Measures a device's float32 errors against float64 on its host's CPU: at the arguments with the largest known errors,
at about 10,000 other rows or 100,000 other numbers, and at the edge cases of the tests' table; also for XLA's own
functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from bench import search
from bench.search import child, climb, corpus, long_rows
from bench.search.functions import HVP, LONG, MANY, Searched, structured
from bench.search.judging import programs
from tests.kernels import ROWS


@functools.cache
def known_errors() -> list[dict]:
    return corpus.read([search.PUBLISHED])


def function_errors(searched: Searched) -> list[dict]:
    """Errors of the value and first derivatives. The rows have as many classes as the row with the largest known error.
    Some functions are also measured in rows of 1,000 classes."""
    first = dataclasses.replace(searched, hvp=False)
    known = corpus.points(first, known_errors())
    some = [x for x in known if x[0]["arguments"] != child.THOUSAND and not x[0]["quantity"].startswith(HVP)]
    (_, (row, *_)) = max(some, key=lambda x: corpus.worst(x[0]))
    sizes = [np.size(row), MANY] if searched.many else [np.size(row)]
    return [line for n in sizes for off_grid in off_grids(first, n) for line in errors_in(first, n, off_grid, known)]


def off_grids(searched: Searched, n: int) -> tuple[bool, ...]:
    return (False, True) if searched.of_logits and n != MANY else (False,)


def errors_in(searched: Searched, n: int, off_grid: bool, known: list) -> Iterator[dict]:
    one = climb.Search(searched, n, off_grid, seed=0)
    points = [x for line, x in known if np.size(x[0]) == n and (line["arguments"] == child.OFF_GRID) == off_grid]
    with jax.default_matmul_precision("highest"):
        one.begin(points) if points else one.step()
    for quantity, worst in one.worst.items():
        found = [(error, corpus.told(searched, quantity, point)) for error, point in worst.ordered()]
        yield line(searched, quantity, child.kind(one), found)


def line(searched: Searched, quantity: str, arguments: str, found: list[tuple[float, dict]]) -> dict:
    """A result line for errors and their arguments, sorted with the largest error first."""
    of = {"function": searched.label, "library": "jce", "dtype": "float32", "quantity": quantity}
    of |= {"arguments": arguments, "ulps": 0.0}
    return of | {"ulps": child.rounded(found[0][0]), "at": found[0][1]} if found else of


def long_row_errors(searched: Searched) -> list[dict]:
    """Errors of the value and first derivatives in long rows: at stored rows and at some new ones. Their length is that
    of the row with the largest known error."""
    stored = [long_rows.known(searched, n, known_errors()) for n in LONG]
    worst = max(filter(None, stored), key=lambda found: max(corpus.worst(line) for line, _ in found))
    points = [point for _, point in worst]
    one = long_rows.Search(searched, points[0][0].classes, seed=0)
    one.begin(points)
    one.step()
    return [
        line(
            searched,
            quantity,
            structured(one.classes),
            [(error, long_rows.told(searched, point)) for error, point in found],
        )
        for quantity, found in one.worst.items()
    ]


def elementary_errors(label: str) -> list[dict]:
    (line,) = child.lines_of_elementary(label, {"quick": True, "seed": 0, "device": None}, known_errors())
    worst = line["worst"] or [{"ulps": 0.0}]
    return [{key: x for key, x in line.items() if key not in ("worst", "device")} | worst[0]]


def corner_errors(label: str) -> list[dict]:
    """How many values and derivatives at the edge cases differ from the table's by more than a relative 1e-6."""
    corners = ROWS[label].corners
    arguments = tuple(np.array(x, np.float32) for x in zip(*(corner.arguments for corner in corners), strict=True))
    expected = [np.array([corner.value for corner in corners])]
    expected += [np.array(x) for x in zip(*(corner.gradient for corner in corners), strict=True)]
    found = programs(Searched(ROWS[label]))[0](arguments, ())
    pairs = list(zip(map(np.asarray, found), expected, strict=True))
    right = [np.isclose(x, e, rtol=1e-6, atol=1e-30, equal_nan=True).reshape(len(corners), -1) for x, e in pairs]
    right = np.concatenate(right, axis=1)
    at = [str(corner.arguments) for corner, good in zip(corners, right.all(1), strict=True) if not good]
    line = {"function": label, "library": "jce", "dtype": "float32", "arguments": "corners"}
    return [line | {"wrong": int((~right).sum()), "of": right.size, "at": at}]
