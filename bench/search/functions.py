"""What is searched: the rows of the tests' table, and what it has no row for; and how far off each is anywhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np

import jce
from bench.search.scales import HVP, SCALES, conditioning, lost_of_differences, spacing
from tests import kernels
from tests.kernels import ROWS, SMOOTHING, TABLE, Kernel
from tests.oracle import entries, partial, precision, second_partial, to_mp

LEAST, MOST = (
    2.0**-63,
    2.0**63,
)  # beyond them a square, or what it divides, is subnormal, which XLA on a CPU takes for 0
FEW, MANY = (2, 3, 5, 16), 1000
VALUE = "value"

# How many ulps a function may be off at the worst argument that is known, in value and in derivatives: the one place
# that says so. By its name, else by what it takes.
BARS = {
    "elementwise": (7, 6),
    "binary_kl_divergence_with_logits": (8, 7),
    "rows": (8, 8),
    "kl_divergence": (10, 10),
    "generalized_kl_divergence": (10, 10),
    "kl_divergence_with_logits": (10, 10),
    "jensen_shannon_divergence": (12, 12),
    "jensen_shannon_divergence_with_logits": (12, 12),
    "1,000 classes": (6, 8),
}


@dataclass(frozen=True, eq=False)
class Searched:
    """A row of the table, and what of it is searched: of second order where `hvp`, with many classes where `many`."""

    kernel: Kernel
    hvp: bool = False
    many: bool = False
    value_only: bool = False

    @property
    def key(self) -> str:
        return kernels.label(self.kernel)

    @property
    def label(self) -> str:
        return f"{self.kernel.name}, {self.kernel.note}" if self.kernel.note else self.kernel.name

    @property
    def one_number(self) -> bool:
        return not self.kernel.has_classes and len(self.kernel.arguments) == 1

    @property
    def of_logits(self) -> bool:
        return self.kernel.has_classes and kernels.LOGIT in self.kernel.domains

    @property
    def quantities(self) -> list[str]:
        names = self.kernel.arguments
        first = [] if self.value_only else [f"∂{name}" for name in names]
        return [VALUE, *first, *([f"{HVP}, {name}" for name in names] if self.hvp else [])]

    def bar(self, quantity: str, arguments: str) -> float:
        kind = "rows" if self.kernel.has_classes else "elementwise"
        kind = arguments if arguments in BARS else self.kernel.name if self.kernel.name in BARS else kind
        return BARS[kind][quantity != VALUE]


# What has no row of its own


def at_half(formula: Callable) -> Callable:
    """The Jensen-Shannon divergence's mean of two KL divergences to the middle, of two lists of probabilities."""

    def divergence(x, y):
        p, q = formula(x), formula(y)
        middle = [(pi + qi) / 2 for pi, qi in zip(p, q, strict=True)]
        return (kernels.kl_divergence(p, middle) + kernels.kl_divergence(q, middle)) / 2

    return divergence


def entropy_of_head(x):
    """Of linear_log_probs, through a head that gives the hidden states back."""
    return jce.linear_log_probs(jnp.zeros(len(x), int), x, jnp.eye(x.shape[-1], dtype=x.dtype)).entropy


def loss_of_head(x):
    head = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jce.linear_cross_entropy(jnp.zeros(len(x), int), x, head, reduction="none")


@functools.wraps(jce.cross_entropy_with_integer_labels)
def derivative_in_smoothing(x):
    def loss(smoothing):
        labels = jnp.zeros(len(x), int)
        return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=smoothing)

    return jax.jvp(loss, (jnp.asarray(SMOOTHING, x.dtype),), (jnp.ones((), x.dtype),))[1]


LABELS = "cross_entropy_with_integer_labels"
JENSEN_SHANNON = "jensen_shannon_divergence"
MORE = [
    dataclasses.replace(
        ROWS[JENSEN_SHANNON], function=jce.jensen_shannon_divergence, note="beta 1/2", formula=at_half(list)
    ),
    dataclasses.replace(
        ROWS[f"{JENSEN_SHANNON}_with_logits"],
        function=jce.jensen_shannon_divergence_with_logits,
        note="beta 1/2",
        formula=at_half(kernels.softmax),
        gradient_scale=(
            lambda x, y: kernels.jensen_shannon_gradient_scale(x, y, 0.5),
            lambda x, y: kernels.jensen_shannon_gradient_scale(y, x, 0.5),
        ),
    ),
    dataclasses.replace(
        ROWS["entropy_with_logits"],
        function=functools.wraps(jce.linear_log_probs)(entropy_of_head),
        note="entropy",
    ),
    dataclasses.replace(ROWS[LABELS], function=functools.wraps(jce.linear_cross_entropy)(loss_of_head)),
    dataclasses.replace(
        ROWS[f"{LABELS}-smoothed"],
        function=derivative_in_smoothing,
        note="∂label_smoothing",
        formula=lambda x: x[0] - sum(x) / len(x),
        value_scale=lambda x: max(x) - min(x),
    ),
]
OF_SECOND_ORDER = {LABELS, "cross_entropy_with_logits", "kl_divergence_with_logits", "entropy_with_logits"} | {
    "binary_cross_entropy_with_logits"
}
OF_MANY = {LABELS, "log_probs_with_integer_labels-of k labels"}
ALL = [
    Searched(
        kernel,
        hvp=kernels.label(kernel) in OF_SECOND_ORDER,
        many=kernels.label(kernel) in OF_MANY,
        value_only=kernel.note == "∂label_smoothing",
    )
    for kernel in [*TABLE, *MORE]
]


# How far off


@functools.cache
def programs(searched: Searched) -> list[Callable]:
    """Of arguments and directions: value and gradient, as one program; and where it is searched the HVP, as another."""
    kernel, positions = searched.kernel, tuple(range(len(searched.kernel.arguments)))
    gradient = jax.grad(kernels.total(kernel), positions)

    def first(arguments, _):
        return [kernel.function(*arguments), *([] if searched.value_only else gradient(*arguments))]

    def second(arguments, directions):
        return jax.jvp(gradient, arguments, directions)[1]

    return [jax.jit(first), *([jax.jit(second)] if searched.hvp else [])]


def results(searched: Searched, arguments: list, directions: list, dtype) -> dict[str, np.ndarray]:
    arguments, directions = (tuple(jnp.asarray(x, dtype) for x in some) for some in (arguments, directions))
    found = [x for program in programs(searched) for x in program(arguments, directions)]
    return {name: np.asarray(x, np.float64) for name, x in zip(searched.quantities, found, strict=True)}


def scales(searched: Searched, arguments: list, directions: list, exact: dict) -> dict[str, np.ndarray]:
    known = SCALES.get(searched.key, {})
    found = {name: known[name](*arguments) if name in known else np.abs(x) for name, x in exact.items()}
    if searched.hvp:
        of_hvp = zip(searched.kernel.arguments, known[HVP](*arguments, *directions), strict=True)
        found |= {f"{HVP}, {name}": scale for name, scale in of_hvp}
    return {name: np.maximum(scale, np.abs(exact[name])) for name, scale in found.items()}


@dataclass(frozen=True)
class Judged:
    """Of one quantity at many arguments, and of each class where it has classes: results, and their errors in ulps."""

    got: np.ndarray
    exact: np.ndarray
    ulp: np.ndarray
    beyond: np.ndarray | float
    counts: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            error = np.maximum(np.abs(self.got - self.exact) / self.ulp - self.beyond, 0)
        error = np.where(np.isfinite(self.got), error, np.inf)
        return np.where(self.counts, error, 0)

    @property
    def of_rows(self) -> np.ndarray:
        return self.errors if self.errors.ndim == 1 else self.errors.max(-1)


def judged(searched: Searched, arguments: list, directions: list, off_grid: bool = False) -> dict[str, Judged]:
    """Against the same function in float64 at the same stored floats, which the tests hold to mpmath.

    Off the grid, where there is nothing of second order, beyond what half an ulp of each difference of logits does.
    """
    with np.errstate(all="ignore"):
        got = results(searched, arguments, directions, jnp.float32)
        arguments, directions = ([x.astype(np.float64) for x in some] for some in (arguments, directions))
        exact = results(searched, arguments, directions, jnp.float64)
        of_differences = lost_of_differences(searched.key, arguments, exact) if off_grid else {}
        found = {}
        for name, scale in scales(searched, arguments, directions, exact).items():
            counts = np.isfinite(exact[name]) & np.isfinite(scale) & (scale > LEAST) & (scale < MOST)
            ulp = spacing(np.where(counts, scale, 1))
            beyond = 0.0
            if off_grid:
                beyond = conditioning(searched.kernel, arguments, scale.ndim > 1) + of_differences.get(name, 0) / ulp
                counts = counts & ~name.startswith(HVP)
            found[name] = Judged(got[name], exact[name], ulp, beyond, counts)
        return found


def by_mpmath(searched: Searched, quantity: str, point: list, place: int) -> mp.mpf:
    """The formula in mpmath, or its derivative at one place, at an argument and, for an HVP, its direction."""
    kernel, k = searched.kernel, len(searched.kernel.arguments)
    row, directions = to_mp(point[:k]), to_mp(point[k:])
    with precision(kernel, point[:k]):
        if quantity == VALUE:
            return kernel.formula(*row)
        i = next(i for i, name in enumerate(kernel.arguments) if quantity in (f"∂{name}", f"{HVP}, {name}"))
        entry = (i, place, step_of(row, i, place))
        if not quantity.startswith(HVP):
            return partial(kernel.formula, row, entry)
        along = [(a, b, t) for a, b, t in entries(directions) if t]
        return sum(second_partial(kernel.formula, row, entry, (a, b, step_of(row, a, b))) * t for a, b, t in along)


def step_of(row: tuple, argument: int, place: int) -> mp.mpf:
    """The number there, for a step in proportion to it; 1 where it is 0."""
    x = row[argument][place] if isinstance(row[argument], list) else row[argument]
    return x or mp.mpf(1)
