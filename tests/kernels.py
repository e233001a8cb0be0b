"""The table: one row a public function. The laws of test_laws.py hold for every row; a new function is a new row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import mpmath as mp
import numpy as np
import pytest

import jce

INF, NAN = np.inf, np.nan
LOG2 = float(np.log(2.0))
TINY = 2.0**-126  # the smallest normal float32


# Samplers


def normalize(x: np.ndarray, dtype) -> np.ndarray:
    """Rows that sum to 1, in the dtype, without subnormal numbers, which XLA takes for 0 on a CPU."""
    x = (x / x.sum(-1, keepdims=True)).astype(dtype)
    return np.where(x < np.finfo(dtype).tiny, np.zeros_like(x), x)


def probability_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tiny = float(np.finfo(dtype).tiny)
    n = shape[-1]

    def dirichlet(concentration):
        return rng.dirichlet(np.full(n, concentration), shape[:-1]) + 2 * tiny

    def zeroed(x):
        x = np.where(rng.random(shape) < 0.3, 0, x)
        x[..., 0] += 0.1
        return x

    def near(epsilon):
        p = normalize(dirichlet(1), dtype)
        return p, normalize(p.astype(np.float64) * (1 + epsilon * rng.standard_normal(shape)), dtype)

    def peaked(delta):
        x = dirichlet(1) * delta
        x[..., 0] = 1 - delta
        return x

    def tiny_entries():
        x = dirichlet(1)
        return np.where(rng.random(shape) < 0.4, tiny * rng.uniform(1, 1e3, shape), x)

    p = normalize(zeroed(dirichlet(1)), dtype)
    regimes = {
        "dirichlet 1": (dirichlet(1), dirichlet(1)),
        "dirichlet 0.1": (dirichlet(0.1), dirichlet(0.1)),
        "zeros in p": (zeroed(dirichlet(1)), dirichlet(1)),
        "zeros in both": (p, np.where(p == 0, 0, dirichlet(1))),
        "tiny": (tiny_entries(), tiny_entries()),
    }
    regimes |= {f"near {e}": near(e) for e in (1e-2, 1e-3, 1e-5, 1e-7)}
    regimes |= {f"peaked {d}": (peaked(d), peaked(3 * d)) for d in (1e-2, 1e-4, 1e-7)}
    p = regimes["dirichlet 1"][0].astype(dtype)
    one_ulp = np.nextafter(p, np.where(rng.random(shape) < 0.5, 0, 1).astype(dtype)).astype(dtype)
    return {name: (normalize(p, dtype), normalize(q, dtype)) for name, (p, q) in regimes.items()} | {
        "one ulp": (p, one_ulp)
    }


def binary_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tiny = float(np.finfo(dtype).tiny)
    alpha = rng.random(shape)
    small = 10 ** rng.uniform(np.log10(tiny) + 1, -1, shape)
    close = 10 ** rng.uniform(np.log10(np.finfo(dtype).eps), -1, shape)
    regimes = {
        "uniform": (alpha, rng.random(shape)),
        "labels": (np.round(alpha), rng.random(shape)),
        "small": (small, rng.permutation(small)),
        "small beta": (alpha, small),
        "near 1": (1 - close, 1 - rng.permutation(close)),
        "small and near 1": (small, 1 - close),
        "around a half": (0.5 + close * rng.choice([-1, 1], shape), 0.5 + close * rng.choice([-1, 1], shape)),
        "around 1 - 1/sqrt 2": (alpha, 0.4142135 + 0.01 * rng.standard_normal(shape)),
    }
    regimes |= {f"near {e}": (alpha, alpha * (1 + e * rng.standard_normal(shape))) for e in (1e-2, 1e-4, 1e-6)}
    alpha = alpha.astype(dtype)
    one_ulp = np.nextafter(alpha, np.where(rng.random(shape) < 0.5, 0, 1).astype(dtype)).astype(dtype)
    clip = [float(np.finfo(dtype).tiny), 1.0]
    return {
        name: tuple(np.where(x == 0, x, np.clip(x, *clip)).astype(dtype) for x in pair)
        for name, pair in regimes.items()
    } | {"one ulp": (alpha, one_ulp)}


@dataclass(frozen=True)
class Corner:
    """Arguments where a formula read literally is 0 · ∞ or 0 / 0, and the truth there."""

    arguments: tuple
    value: float
    gradient: tuple


@dataclass(frozen=True)
class Kernel:
    """A public function, its formula in mpmath, where to try it, and how close it must come.

    The formula takes one distribution an argument, as a list (classes) or a number (elementwise). Bars are in ulps of
    the exact result, or of `value_scale` and `gradient_scale`, the sum of the absolute values of the closed form's
    terms, where that is given; those of `hvp_bar` are always scaled, by Σ |Hᵢⱼ vⱼ|. Derivatives are compared with the
    formula's where every number is inside the open domain; on its edge are the corners.
    """

    function: Callable
    arguments: tuple[str, ...]
    formula: Callable
    value_bar: float
    gradient_bar: tuple[float, ...]
    hvp_bar: float
    corners: Sequence[Corner]
    value_scale: Callable | None = None
    gradient_scale: tuple[Callable | None, ...] = (None, None)
    never_negative: bool = False
    has_classes: bool = True
    regimes: Callable = probability_regimes
    domain: tuple[float, float] = (0, INF)

    @property
    def name(self) -> str:
        return self.function.__name__

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...], dtype) -> dict[str, list[np.ndarray]]:
        """The arguments by regime, each of the shape given; for elementwise rows its last axis is a batch axis too."""
        return {name: list(pair[: len(self.arguments)]) for name, pair in self.regimes(rng, shape, dtype).items()}


# Formulas


def log_inverse(q):
    """log 1/q, and +∞ at 0."""
    return -mp.log(q) if q > 0 else mp.inf


def weighted(p, x):
    """p · x, with 0 · ∞ = 0."""
    return p * x if p else mp.mpf(0)


def entropy(p):
    return sum(weighted(pi, log_inverse(pi)) for pi in p)


def cross_entropy(p, q):
    return sum(weighted(pi, log_inverse(qi)) for pi, qi in zip(p, q, strict=True))


def kl_divergence(p, q):
    return sum(weighted(pi, log_inverse(qi) - log_inverse(pi)) for pi, qi in zip(p, q, strict=True) if pi)


def generalized_kl_divergence(p, q):
    return kl_divergence(p, q) - sum(p) + sum(q)


def two_classes(formula):
    """The binary form of a formula: p = {α, 1 - α}."""
    return lambda *numbers: formula(*([x, 1 - x] for x in numbers))


def log_ratio(p, q):
    return mp.log(p) - mp.log(q)


# The rows


TABLE = [
    Kernel(
        function=jce.entropy,
        arguments=("p",),
        formula=entropy,
        value_bar=4,
        gradient_bar=(5,),
        gradient_scale=(lambda p: [abs(mp.log(pi)) + 1 for pi in p],),
        hvp_bar=5,
        corners=[
            Corner(([0.0, 1.0],), 0.0, ([INF, -1.0],)),
            Corner(([0.5, 0.5],), LOG2, ([LOG2 - 1, LOG2 - 1],)),
            Corner(([0.0, 0.0],), 0.0, ([INF, INF],)),
            Corner(([-0.0, 1.0],), 0.0, ([INF, -1.0],)),
            Corner(([TINY, 1.0],), 126 * LOG2 * TINY, ([126 * LOG2 - 1, -1.0],)),
            Corner(([NAN, 1.0],), NAN, ([NAN, -1.0],)),
        ],
    ),
    Kernel(
        function=jce.cross_entropy,
        arguments=("p", "q"),
        formula=cross_entropy,
        value_bar=3,
        gradient_bar=(4, 1),
        hvp_bar=4,
        corners=[
            Corner(([0.0, 1.0], [0.5, 0.5]), LOG2, ([LOG2, LOG2], [0.0, -2.0])),
            Corner(([0.0, 1.0], [0.0, 1.0]), 0.0, ([0.0, 0.0], [0.0, -1.0])),
            Corner(([0.0, 1.0], [0.0, 0.5]), LOG2, ([0.0, LOG2], [0.0, -2.0])),
            Corner(([0.5, 0.5], [0.0, 1.0]), INF, ([INF, 0.0], [-INF, -0.5])),
            Corner(([0.5, 0.5], [-0.0, 1.0]), INF, ([INF, 0.0], [-INF, -0.5])),
            Corner(([TINY, 1.0], [0.0, 1.0]), INF, ([INF, 0.0], [-INF, -1.0])),
            Corner(([0.0, 1.0], [TINY, 1.0]), 0.0, ([126 * LOG2, 0.0], [0.0, -1.0])),
            Corner(([0.0, 0.0], [0.0, 0.0]), 0.0, ([0.0, 0.0], [0.0, 0.0])),
            Corner(([NAN, 1.0], [1.0, 1.0]), NAN, ([NAN, 0.0], [NAN, -1.0])),
            Corner(([1.0, 1.0], [NAN, 1.0]), NAN, ([NAN, 0.0], [NAN, -1.0])),
        ],
    ),
    Kernel(
        function=jce.kl_divergence,
        arguments=("p", "q"),
        formula=kl_divergence,
        value_bar=4,
        value_scale=lambda p, q: generalized_kl_divergence(p, q) + abs(sum(p) - sum(q)),
        gradient_bar=(3, 1),
        gradient_scale=(lambda p, q: [abs(log_ratio(pi, qi)) + 1 for pi, qi in zip(p, q, strict=True)], None),
        hvp_bar=4,
        corners=[
            Corner(([0.0, 1.0], [0.5, 0.5]), LOG2, ([-INF, LOG2 + 1], [0.0, -2.0])),
            Corner(([0.0, 1.0], [0.0, 1.0]), 0.0, ([0.0, 1.0], [0.0, -1.0])),
            Corner(([0.5, 0.5], [0.5, 0.5]), 0.0, ([1.0, 1.0], [-1.0, -1.0])),
            Corner(([0.5, 0.5], [0.0, 1.0]), INF, ([INF, 1 - LOG2], [-INF, -0.5])),
            Corner(([0.5, 0.5], [-0.0, 1.0]), INF, ([INF, 1 - LOG2], [-INF, -0.5])),
            Corner(([TINY, 1.0], [0.0, 1.0]), INF, ([INF, 1.0], [-INF, -1.0])),
            Corner(([0.0, 0.0], [0.0, 0.0]), 0.0, ([0.0, 0.0], [0.0, 0.0])),
            Corner(([NAN, 1.0], [1.0, 1.0]), NAN, ([NAN, 1.0], [NAN, -1.0])),
            Corner(([1.0, 1.0], [NAN, 1.0]), NAN, ([NAN, 1.0], [NAN, -1.0])),
        ],
    ),
    Kernel(
        function=jce.generalized_kl_divergence,
        arguments=("p", "q"),
        formula=generalized_kl_divergence,
        value_bar=4,
        gradient_bar=(4, 2),
        hvp_bar=4,
        never_negative=True,
        corners=[
            Corner(([0.0, 1.0], [0.5, 0.5]), LOG2, ([-INF, LOG2], [1.0, -1.0])),
            Corner(([0.0, 1.0], [0.0, 1.0]), 0.0, ([0.0, 0.0], [1.0, 0.0])),
            Corner(([0.0, 1.0], [2.0, 1.0]), 2.0, ([-INF, 0.0], [1.0, 0.0])),
            Corner(([0.5, 0.5], [0.0, 1.0]), INF, ([INF, -LOG2], [-INF, 0.5])),
            Corner(([0.5, 0.5], [-0.0, 1.0]), INF, ([INF, -LOG2], [-INF, 0.5])),
            Corner(([TINY, 1.0], [0.0, 1.0]), INF, ([INF, 0.0], [-INF, 0.0])),
            Corner(([0.0, 0.0], [0.0, 0.0]), 0.0, ([0.0, 0.0], [1.0, 1.0])),
            Corner(([NAN, 1.0], [1.0, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([1.0, 1.0], [NAN, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
        ],
    ),
    Kernel(
        function=jce.binary_entropy,
        arguments=("alpha",),
        has_classes=False,
        regimes=binary_regimes,
        domain=(0, 1),
        formula=two_classes(entropy),
        value_bar=4,
        gradient_bar=(5,),
        gradient_scale=(lambda a: [abs(mp.log(a)) + abs(mp.log(1 - a))],),
        hvp_bar=5,
        corners=[
            Corner((0.0,), 0.0, (INF,)),
            Corner((-0.0,), 0.0, (INF,)),
            Corner((1.0,), 0.0, (-INF,)),
            Corner((0.5,), LOG2, (0.0,)),
            Corner((NAN,), NAN, (NAN,)),
            Corner((-0.5,), NAN, (NAN,)),
            Corner((1.5,), NAN, (NAN,)),
        ],
    ),
    Kernel(
        function=jce.binary_cross_entropy,
        arguments=("alpha", "beta"),
        has_classes=False,
        regimes=binary_regimes,
        domain=(0, 1),
        formula=two_classes(cross_entropy),
        value_bar=3,
        gradient_bar=(4, 4),
        hvp_bar=4,
        corners=[
            Corner((0.0, 0.0), 0.0, (0.0, 1.0)),
            Corner((-0.0, -0.0), 0.0, (0.0, 1.0)),
            Corner((1.0, 1.0), 0.0, (0.0, -1.0)),
            Corner((0.0, 1.0), INF, (-INF, INF)),
            Corner((1.0, 0.0), INF, (INF, -INF)),
            Corner((0.0, 0.5), LOG2, (0.0, 2.0)),
            Corner((1.0, 0.5), LOG2, (0.0, -2.0)),
            Corner((0.5, 0.0), INF, (INF, -INF)),
            Corner((0.5, -0.0), INF, (INF, -INF)),
            Corner((0.5, 1.0), INF, (-INF, INF)),
            Corner((0.5, 0.5), LOG2, (0.0, 0.0)),
            Corner((0.25, 0.25), 2 * LOG2 - 0.75 * np.log(3.0), (np.log(3.0), 0.0)),
            Corner((NAN, 0.5), NAN, (0.0, NAN)),
            Corner((0.5, NAN), NAN, (NAN, NAN)),
        ],
    ),
    Kernel(
        function=jce.binary_kl_divergence,
        arguments=("alpha", "beta"),
        has_classes=False,
        regimes=binary_regimes,
        domain=(0, 1),
        formula=two_classes(kl_divergence),
        value_bar=8,
        gradient_bar=(4, 4),
        gradient_scale=(lambda a, b: [abs(log_ratio(a, b)) + abs(log_ratio(1 - a, 1 - b))], None),
        hvp_bar=8,
        never_negative=True,
        corners=[
            Corner((0.0, 0.0), 0.0, (0.0, 1.0)),
            Corner((-0.0, -0.0), 0.0, (0.0, 1.0)),
            Corner((1.0, 1.0), 0.0, (0.0, -1.0)),
            Corner((0.0, 1.0), INF, (-INF, INF)),
            Corner((1.0, 0.0), INF, (INF, -INF)),
            Corner((0.0, 0.5), LOG2, (-INF, 2.0)),
            Corner((1.0, 0.5), LOG2, (INF, -2.0)),
            Corner((0.5, 0.0), INF, (INF, -INF)),
            Corner((0.5, -0.0), INF, (INF, -INF)),
            Corner((0.5, 1.0), INF, (-INF, INF)),
            Corner((0.5, 0.5), 0.0, (0.0, 0.0)),
            Corner((0.25, 0.25), 0.0, (0.0, 0.0)),
            Corner((NAN, 0.5), NAN, (NAN, NAN)),
            Corner((0.5, NAN), NAN, (NAN, NAN)),
        ],
    ),
]


# For tests of every row


each_kernel = pytest.mark.parametrize("kernel", TABLE, ids=lambda kernel: kernel.name)
each_with_classes = pytest.mark.parametrize(
    "kernel", [kernel for kernel in TABLE if kernel.has_classes], ids=lambda kernel: kernel.name
)


def easy(kernel: Kernel, rng: np.random.Generator, shape: tuple[int, ...], dtype=np.float32) -> list[np.ndarray]:
    """Arguments without corners."""
    return next(iter(kernel.sample(rng, shape, dtype).values()))


def total(kernel: Kernel) -> Callable:
    return lambda *arguments: kernel.function(*arguments).sum()


def gradient(kernel: Kernel) -> Callable:
    """The gradient in every argument, as a tuple."""
    return jax.grad(total(kernel), tuple(range(len(kernel.arguments))))
