"""One row of the table: a function, its formula, the arguments for its tests, and its error bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from tests.kernels.samplers import INF, NAN, probability_regimes

LOG2, LOG8_7 = float(np.log(2.0)), float(np.log(8 / 7))
TAIL, LOG_Z = "tail", "log Z"  # values of `Kernel.note` that tests look up
LOGIT = (-INF, INF)
IMPOSSIBLE = [
    [NAN, 0.0, 0.0, 0.0],
    [0.0, 0.0, NAN, 0.0],
    [INF, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, INF],
    [-INF] * 4,
]  # logits that define no distribution


@dataclass(frozen=True)
class Corner:
    """An edge case: arguments at which the formula, read literally, is 0 · ∞ or 0 / 0, and the correct results."""

    arguments: tuple
    value: float
    gradient: tuple
    second_order: bool = True

    def holds_nan(self) -> bool:
        return any(np.isnan(x).any() for x in (*self.arguments, self.value, *self.gradient))


@dataclass(frozen=True, eq=False)  # hashed by identity
class Kernel:
    """A public function, its formula in mpmath, the arguments for its tests, and its error bars.

    The formula takes one distribution per argument: a list (if there are classes) or a number (if elementwise). Bars
    are in ulps of the exact result. If `value_scale` or `gradient_scale` is given, they are in ulps of that scale, the
    sum of the absolute values of the closed form's terms. `hvp_bar` is always in ulps of a scale: Σ |Hᵢⱼ vⱼ|, or, if
    Hᵢⱼ is itself a sum whose terms cancel, `hvp_scale`, a function of the arguments and the direction. Derivatives are
    compared with the formula's wherever every number is inside its open domain. The `corners` cover the boundary.
    `absent` is the number that stands for an absent class in each argument, or None if no number can.
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
    hvp_scale: Callable | None = None
    never_negative: bool = False
    has_classes: bool = True
    regimes: Callable = probability_regimes
    domains: tuple[tuple[float, float], ...] = ()
    absent: tuple[float | None, ...] = (0.0, 0.0)
    listed: tuple[int, ...] = ()  # classes whose probability enters the value, however small it is
    note: str = ""

    def __post_init__(self):
        if not self.domains:
            object.__setattr__(self, "domains", ((0, INF),) * len(self.arguments))
        if jax.config.jax_debug_nans:
            object.__setattr__(self, "corners", [corner for corner in self.corners if not corner.holds_nan()])

    @property
    def name(self) -> str:
        return self.function.__name__

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...], dtype) -> dict[str, list[np.ndarray]]:
        """The arguments by regime, each of the given shape. For elementwise rows the last axis is a batch axis too."""
        return {name: list(pair[: len(self.arguments)]) for name, pair in self.regimes(rng, shape, dtype).items()}


def label(kernel: Kernel) -> str:
    return f"{kernel.name}-{kernel.note}" if kernel.note else kernel.name
