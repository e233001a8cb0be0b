"""The points that a search tries: randomly sampled arguments, and neighbors of earlier points.

A point is a list of arrays: the arguments, followed by the directions of a Hessian-vector product. A batch of points
is a list of arrays with one more leading axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.search.functions import Searched
from bench.search.judging import LEAST
from tests.kernels import LOGIT

GRID, WITHIN = 2.0**-12, 32.0  # in float32, differences of such logits are exact, and differences of these too
LARGEST_LOGIT = 87.0  # for elementwise functions: exp(87) is finite, and exp(-87) is normal
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Numbers:
    """The numbers of an argument: how they are sampled, their bounds, and their grid if they have one."""

    draw: Draw
    lowest: float
    highest: float
    grid: float = 0.0

    def fresh(self, rng, shape) -> np.ndarray:
        return self.within(self.draw(rng, shape))

    def within(self, x: np.ndarray) -> np.ndarray:
        """The nearest allowed float32. Off the grid, a number so small that it could lead to subnormals becomes 0."""
        x = np.clip(np.nan_to_num(x), self.lowest, self.highest)
        x = np.round(x / self.grid) * self.grid if self.grid else np.where(np.abs(x) < LEAST, 0, x)
        return x.astype(np.float32)

    def moved(self, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """x moved by this many steps of the grid, or by this many ulps if there is no grid."""
        if self.grid:
            return self.within(x + steps * self.grid)
        bits = x.view(np.int32).astype(np.int64)
        bits = np.clip(np.abs(np.where(bits < 0, -(2**31) - bits, bits) + steps), 0, 0x7F000000)
        return self.within(np.copysign(bits.astype(np.int32).view(np.float32), x))


# How arguments are sampled


def spread(rng, shape, low, high):
    """Powers of 10, one for each row."""
    return 10 ** rng.uniform(low, high, (shape[0], *[1] * (len(shape) - 1)))


def row_of_logits(rng, shape):
    """Rows of many spreads. In half of the rows one class is raised by up to 25."""
    x = spread(rng, shape, -2.5, 1) * rng.standard_normal(shape)
    x[np.arange(len(x)), rng.integers(shape[1], size=len(x))] += np.maximum(rng.uniform(-25, 25, len(x)), 0)
    return x


def shifted_row_of_logits(rng, shape):
    """Rows with a common offset: up to 60 in half of the rows, and up to 10⁶ in a tenth of them."""
    kind, sign = rng.random((shape[0], 1)), rng.choice([-1, 1], (shape[0], 1))
    offset = np.where(kind < 0.1, spread(rng, shape, 1, 6), rng.uniform(0, 60, (shape[0], 1)) * (kind < 0.6))
    return row_of_logits(rng, shape) + sign * offset


def row_of_probabilities(rng, shape):
    """Rows from nearly one-hot to nearly uniform, with some zeros. About a third of the rows don't sum to 1."""
    x = rng.standard_gamma(np.broadcast_to(spread(rng, shape, -1.5, 1), shape)) + LEAST
    x = np.where(rng.random(shape) < 0.05, 0, x)
    total = np.maximum(x.sum(-1, keepdims=True), LEAST)
    return x / total * np.where(rng.random((shape[0], 1)) < 0.3, rng.random(shape), 1)


def one_probability(rng, shape):
    near_1, kind = 1 - spread(rng, shape, -7, 0), rng.integers(4, size=shape)
    of_any_size = spread(rng, shape, np.log10(LEAST), 0)
    return np.choose(kind, [rng.random(shape), of_any_size, near_1, rng.normal(0.5, 0.05, shape)])


def one_logit(rng, shape):
    return spread(rng, shape, -4, np.log10(LARGEST_LOGIT)) * rng.choice([-1, 1], shape)


def log_probability(rng, shape):
    return -spread(rng, shape, -8, 2.5)


def direction(rng, shape):
    """Random directions. Half of them are 0 except in one class or a few."""
    some = rng.random(shape) < np.where(rng.random((shape[0], *[1] * (len(shape) - 1))) < 0.5, 0.3, 1)
    return rng.standard_normal(shape) * some


GRID_OF_LOGITS = Numbers(row_of_logits, -WITHIN, WITHIN, GRID)
ANY_LOGITS = Numbers(shifted_row_of_logits, -2e6, 2e6)
DIRECTION = Numbers(direction, -4, 4, 2.0**-6)


def kinds(searched: Searched, off_grid: bool) -> list[Numbers]:
    """The `Numbers` of each argument, followed by those of each direction."""
    kernel = searched.kernel

    def kind(domain):
        if kernel.name == "sampled_kl_divergence":
            return Numbers(log_probability, -400, 0)
        if kernel.has_classes and domain == LOGIT:
            return ANY_LOGITS if off_grid else GRID_OF_LOGITS
        if kernel.has_classes:
            return Numbers(row_of_probabilities, 0, 1)
        return Numbers(one_logit, -LARGEST_LOGIT, LARGEST_LOGIT) if domain == LOGIT else Numbers(one_probability, 0, 1)

    numbers = [kind(domain) for domain in kernel.domains[: len(kernel.arguments)]]
    return [*numbers, *[DIRECTION] * (len(numbers) if searched.hvp else 0)]


def fresh(rng, of: list[Numbers], shape) -> list[np.ndarray]:
    """Randomly sampled points. If two arguments are of the same kind, they are near each other in most points."""
    points = [numbers.fresh(rng, shape) for numbers in of]
    if len(of) > 1 and of[0] == of[1] != DIRECTION:
        alike = rng.random((shape[0], *[1] * (len(shape) - 1))) < 0.7
        points[1] = np.where(alike, near(rng, of[0], points[0]), points[1])
        if rng.random() < 0.5:
            points[:2] = points[1::-1]
    return points


def near(rng, numbers: Numbers, x: np.ndarray) -> np.ndarray:
    """x with noise, from about an ulp to several times the number. It is relative to the number, to 1 - x, or to 1."""
    noise = spread(rng, x.shape, -7, 1.3) * rng.standard_normal(x.shape)
    noise *= rng.random(x.shape) < np.where(rng.random((len(x), *[1] * (x.ndim - 1))) < 0.5, 0.3, 1)
    of = np.choose(rng.integers(3, size=(len(x), *[1] * (x.ndim - 1))), [x, 1 - x, np.ones_like(x)])
    return numbers.within(x.astype(np.float64) + noise * of)


def neighbours(rng, of: list[Numbers], points: list[np.ndarray]) -> list[np.ndarray]:
    """Moves each point in one way: by steps of one number or of all, by a factor, by a shift, or in rows by permuting
    the classes or sampling a class again. Sometimes only one of the arguments is moved."""
    shape = points[0].shape
    column = (len(points[0]), *[1] * (len(shape) - 1))
    move, alone = rng.integers(9, size=column), rng.integers(len(points), size=column)
    factor, shift = (10 ** rng.uniform(-6, 0, column) * rng.standard_normal(column) for _ in range(2))
    few = rng.random(shape) < np.where(rng.random(column) < 0.5, 1 / shape[-1] if len(shape) > 1 else 0.5, 1)
    others = fresh(rng, of, shape) if len(shape) > 1 else None
    order = np.argsort(rng.random(shape), axis=-1)
    class_ = rng.integers(shape[-1], size=column) == np.arange(shape[-1]) if others else None
    moved = []
    for i, (numbers, x) in enumerate(zip(of, points, strict=True)):
        steps = np.floor(2 ** rng.uniform(0, 14, column)).astype(np.int64) * rng.integers(-1, 2, shape)
        y = np.where(move < 5, numbers.moved(x, steps * few), x)
        y = np.where(move == 5, numbers.within(x * (1 + factor)), y)
        y = np.where(move == 6, numbers.within(x + shift), y)
        if others:
            y = np.where((move == 7) & class_, others[i], y)
            y = np.where(move == 8, np.take_along_axis(x, order, -1), y)
        else:
            y = np.where(move == 7, numbers.within(1 - (1 - x.astype(np.float64)) * (1 + factor)), y)
        kept = (move < 6) & (rng.random(column) < 0.3) & (alone != i)
        moved.append(np.where(kept, x, y))
    return moved
