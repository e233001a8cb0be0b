"""The search: random points, and climbing from the worst points. Each cell of binades keeps its own worst point."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from bench.search import arguments
from bench.search.functions import Searched
from bench.search.judging import judged

NUMBERS = 2**17  # per argument in a batch
CANDIDATES = 256  # per batch
CELLS = 4000


@dataclass
class Worst:
    """The worst point in each cell, for one quantity. The cells keep the search from staying in one place."""

    cells: dict[tuple, tuple[float, list[np.ndarray]]] = field(default_factory=dict)

    def add(self, errors: np.ndarray, points: list[np.ndarray]) -> None:
        some = np.argpartition(-errors, min(CANDIDATES, len(errors) - 1))[:CANDIDATES]
        some = some[errors[some] > 0]
        if not len(some):
            return
        for i, cell in zip(some, cells([x[some] for x in points]), strict=True):
            if errors[i] > self.cells.get(cell, (0.0,))[0]:
                self.cells[cell] = float(errors[i]), [x[i] for x in points]
        if len(self.cells) > CELLS:
            self.cells = dict(sorted(self.cells.items(), key=lambda item: -item[1][0])[: CELLS // 2])

    def ordered(self) -> list[tuple[float, list[np.ndarray]]]:
        return sorted(self.cells.values(), key=lambda found: -found[0])

    def drawn(self, rng, count: int) -> list[np.ndarray]:
        """Points to continue from. Half are among the ten worst, the others among the worst 200 or, sometimes, all."""
        worst = self.ordered()[: 200 if rng.random() < 0.6 else CELLS]
        i = np.where(rng.random(count) < 0.5, rng.integers(min(10, len(worst)), size=count), 0)
        i = np.where(i, i, rng.integers(len(worst), size=count))
        return [np.stack([point[k] for _, point in worst])[i] for k in range(len(worst[0][1]))]


def cells(points: list[np.ndarray]) -> list[tuple]:
    """The binades of the arguments and of their difference. For rows, also of the largest entry minus others."""

    def binades(x):
        with np.errstate(divide="ignore"):
            return np.maximum(np.round(np.log2(np.abs(x))), -100)

    features = []
    for x in points[:2]:
        x = x.astype(np.float64)
        if x.ndim == 1:
            features += [np.sign(x), binades(x), binades(1 - x)]
        else:
            ordered = np.sort(x, -1)
            features += [*binades(ordered[:, -1:] - ordered[:, [0, -2]]).T]
            features += [x.argmax(-1) == 0, binades(ordered[:, -1])]
    if len(points) > 1:
        apart = np.abs(points[0].astype(np.float64) - points[1])
        features.append(binades(apart if apart.ndim == 1 else apart.max(-1)))
    return list(map(tuple, np.vstack(features).T))


class Search:
    """The search for one function, in rows of `classes` classes, on the grid or off it."""

    def __init__(self, searched: Searched, classes: int, off_grid: bool, seed: int):
        self.searched, self.off_grid = searched, off_grid
        self.numbers = arguments.kinds(searched, off_grid)
        self.shape = (max(1, NUMBERS // classes), classes) if searched.kernel.has_classes else (NUMBERS,)
        self.worst = {quantity: Worst() for quantity in searched.quantities}
        self.rng, self.tried = np.random.default_rng(seed), 0

    def batch(self) -> list[np.ndarray]:
        """A third of the points are random. The others are neighbors of the worst points for each quantity."""
        count, known = self.shape[0], [worst for worst in self.worst.values() if worst.cells]
        if not known:
            return arguments.fresh(self.rng, self.numbers, self.shape)
        share = 2 * count // 3 // len(known)
        parts = [arguments.neighbours(self.rng, self.numbers, worst.drawn(self.rng, share)) for worst in known]
        rest = (count - share * len(known), *self.shape[1:])
        parts.append(arguments.fresh(self.rng, self.numbers, rest))
        return [np.concatenate(x) for x in zip(*parts, strict=True)]

    def step(self) -> None:
        self.try_(self.batch())

    def begin(self, known: list[list[np.ndarray]]) -> None:
        """Tries the points of earlier searches, in a batch with random points."""
        points = self.batch()
        for x, column in zip(points, zip(*known, strict=True), strict=True):
            x[: len(known)] = np.stack(column)
        self.try_(points)

    def try_(self, points: list[np.ndarray]) -> None:
        k = len(self.searched.kernel.arguments)
        found = judged(self.searched, points[:k], points[k:], self.off_grid)
        for quantity, worst in self.worst.items():
            worst.add(found[quantity].of_rows, points)
        self.tried += len(points[0])


def run(searches: list[Search], seconds: float, batches: int) -> None:
    """Runs the searches in turn, for `seconds` in all or for `batches` batches each, whichever ends first."""
    end, done = time.monotonic() + seconds, 0
    while done < batches and time.monotonic() < end:
        for search in searches:
            search.step()
        done += 1
