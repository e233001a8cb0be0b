"""Searches rows of thousands of classes. Such a row is stored as a recipe: a kind of row and its few parameters.

With the same version of NumPy a recipe always gives the same floats. Its logits are on the search's grid, with a common
offset of up to 1000, so differences of logits are exact in float32. Probabilities are the softmax of such logits.

The reference is the same function in float64. mpmath isn't used for these rows: one derivative would take minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bench.search.arguments import GRID
from bench.search.functions import LONG, Searched, structured
from bench.search.judging import LEAST, judged
from tests.kernels import LOGIT

WITHIN = 2.0**11  # logits on the grid below this have 23 bits, and their differences 24
FEWEST_ROWS, NUMBERS = 4, 2**17  # in a batch
QUICK_STEPS = 4
KEPT = 10  # points per quantity, from which the search continues


def ramp(rng, n):
    return np.linspace(-1, 0, n)


# Rows of spread 1. Equal numbers are the hardest to add: each addition may round in the same direction.
KINDS: dict[str, Callable] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "equal": lambda rng, n: np.zeros(n),
    "rising": ramp,
    "falling": lambda rng, n: ramp(rng, n)[::-1],
    "two levels": lambda rng, n: -1.0 * rng.integers(2, size=n),
    "two halves": lambda rng, n: -1.0 * (np.arange(n) >= n // 2),
    "few above": lambda rng, n: -1.0 * (rng.random(n) > 0.01),
}


class Recipe(NamedTuple):
    """`scale` times a row of the given kind, plus `offset`. The class `at` is moved by `ahead`, up or down. With
    `beside` the result is added to the first argument's row."""

    classes: int
    kind: str
    seed: int
    scale: float
    ahead: float
    at: int
    offset: float = 0.0
    beside: bool = False

    @property
    def fields(self) -> dict:
        return {name: x for name, x in self._asdict().items() if x != self._field_defaults.get(name)}

    @classmethod
    def drawn(cls, rng: np.random.Generator, classes: int, beside: bool) -> Recipe:
        return cls(
            classes=classes,
            kind=str(rng.choice(list(KINDS))),
            seed=int(rng.integers(2**31)),
            scale=rounded(10 ** rng.uniform(-4, 1.2)),
            ahead=rounded(rng.uniform(-25, 25)) if rng.random() < 0.6 else 0.0,
            at=int(rng.choice([0, classes // 2, classes - 1])),
            offset=rounded(rng.uniform(-1000, 1000)) if rng.random() < 0.2 else 0.0,
            beside=beside,
        )

    def neighbour(self, rng: np.random.Generator) -> Recipe:
        step = 10 ** rng.uniform(-4, -0.5) * rng.standard_normal()
        scale, ahead, seed = rounded(self.scale * (1 + step)), rounded(self.ahead + step), int(rng.integers(2**31))
        moves = ({"scale": scale}, {"ahead": ahead}, {"seed": seed})
        return self._replace(**moves[rng.integers(len(moves))])

    def logits(self, first: np.ndarray | None) -> np.ndarray:
        x = self.scale * KINDS[self.kind](np.random.default_rng(self.seed), self.classes) + self.offset
        x[self.at] += self.ahead
        x = x + first if self.beside else x
        return np.clip(np.round(x / GRID) * GRID, GRID - WITHIN, WITHIN - GRID)

    def __str__(self) -> str:
        return f"{self.kind} × {self.scale:.4g}, class {self.at} {self.ahead:+.4g}"


def rounded(x: float) -> float:
    return float(f"{x:.5g}")


def probabilities(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    p /= p.sum()
    return np.where(p < LEAST, 0, p)


def row_of(searched: Searched, recipes: list[Recipe]) -> list[np.ndarray]:
    """The arguments as float32 rows."""
    domains = searched.kernel.domains[: len(recipes)]
    logits: list[np.ndarray] = []
    for recipe in recipes:
        logits.append(recipe.logits(logits[0] if logits else None))
    rows = [x if domain == LOGIT else probabilities(x) for x, domain in zip(logits, domains, strict=True)]
    return [x.astype(np.float32) for x in rows]


def told(searched: Searched, recipes: list[Recipe]) -> dict[str, dict]:
    """The recipes in the form that result lines store."""
    return {name: recipe.fields for name, recipe in zip(searched.kernel.arguments, recipes, strict=True)}


def recipes(at: dict[str, dict]) -> list[Recipe]:
    return [Recipe(**recipe) for recipe in at.values()]


def known(searched: Searched, classes: int, lines: list[dict]) -> list[tuple[dict, list[Recipe]]]:
    """The stored recipes, each with its result line."""
    lines = [x for x in lines if (x["function"], x["arguments"]) == (searched.label, structured(classes))]
    return [(x, recipes(of["at"])) for x in lines for of in x["worst"]]


class Search:
    """The search for one function's value and first derivatives, in rows of `classes` classes."""

    def __init__(self, searched: Searched, classes: int, seed: int):
        self.searched, self.classes = searched.in_long_rows, classes
        self.rows = max(FEWEST_ROWS, NUMBERS // classes)
        self.worst: dict[str, list[tuple[float, list[Recipe]]]] = {x: [] for x in self.searched.quantities}
        self.rng = np.random.default_rng(seed)

    def drawn(self) -> list[Recipe]:
        """A new point: with probability 1/2 a neighbor of one of the worst points, otherwise a random point."""
        worst = self.worst[str(self.rng.choice(list(self.worst)))]
        if worst and self.rng.random() < 0.5:
            _, point = worst[self.rng.integers(len(worst))]
            return [recipe.neighbour(self.rng) if self.rng.random() < 0.7 else recipe for recipe in point]
        domains = self.searched.kernel.domains
        alike = len(self.searched.kernel.arguments) > 1 and domains[0] == domains[1]
        beside = [False, bool(alike and self.rng.random() < 0.5)]
        beside = beside[: len(self.searched.kernel.arguments)]
        return [Recipe.drawn(self.rng, self.classes, x) for x in beside]

    def errors(self, points: list[list[Recipe]]) -> dict[str, np.ndarray]:
        """The errors at up to `self.rows` points. Fewer points are repeated until the batch is full."""
        rows = [row_of(self.searched, point) for point in points]
        batch = [np.stack([rows[i % len(rows)][k] for i in range(self.rows)]) for k in range(len(rows[0]))]
        return {name: x.of_rows[: len(points)] for name, x in judged(self.searched, batch, []).items()}

    def try_(self, points: list[list[Recipe]]) -> None:
        for quantity, errors in self.errors(points).items():
            found = [*self.worst[quantity], *((float(x), point) for x, point in zip(errors, points, strict=True) if x)]
            by_point = {str(told(self.searched, point)): (x, point) for x, point in found}
            self.worst[quantity] = sorted(by_point.values(), key=lambda x: -x[0])[:KEPT]

    def begin(self, points: list[list[Recipe]]) -> None:
        """Tries the points of earlier searches."""
        for start in range(0, len(points), self.rows):
            self.try_(points[start : start + self.rows])

    def step(self) -> None:
        self.try_([self.drawn() for _ in range(self.rows)])


def searches(searched: Searched, todo: dict, lines: list[dict]) -> list[Search]:
    """Searches rows of each number of classes in turn, with an equal share of the time for each."""
    every, done = LONG[: 1 if todo["quick"] else None], []
    for n in every:
        search, end = Search(searched, n, todo["seed"]), time.monotonic() + todo["seconds"] / len(every)
        search.begin([point for _, point in known(searched, n, lines)])
        steps = 0
        while not steps or (time.monotonic() < end and not (todo["quick"] and steps == QUICK_STEPS)):
            search.step()
            steps += 1
        done.append(search)
    return done
