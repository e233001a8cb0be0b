"""The table: one row a public function. The laws in test_*.py hold for every row; a new function is a new row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

import jce

INF, NAN = np.inf, np.nan
LOG2, LOG8_7 = float(np.log(2.0)), float(np.log(8 / 7))
TINY = 2.0**-126  # the smallest normal float32
LOWEST = float(np.finfo(np.float32).min)  # which many write for -∞


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


def logit_rows(rng, shape, dtype) -> dict[str, np.ndarray]:
    """Logits of every spread and offset; class 0, which the label rows take for their label, ahead or behind."""
    n = shape[-1]

    def normal(sigma, offset=0.0):
        return sigma * rng.standard_normal(shape) + offset

    def margin(gap, ahead):
        x = normal(1)
        x[..., 0 if ahead else 1] = x.max(-1) + gap
        return x

    def tied():
        x = normal(3)
        x[..., rng.integers(n)] = x[..., 0] = x.max(-1) + 1
        return x

    def masked():
        x = normal(3)
        return np.where((rng.random(shape) < 0.3) & (np.arange(n) > 1), -INF, x)

    rows = {f"sigma {s}": normal(s) for s in (1, 3, 10)}
    rows |= {f"ahead by {g}": margin(g, True) for g in (5, 10, 20, 40, 80)}
    rows |= {f"behind by {g}": margin(g, False) for g in (5, 20, 80)}
    rows |= {f"offset {o:g}": normal(3, o) for o in (1e4, -1e4, 1e6, -1e6)}
    return {name: x.astype(dtype) for name, x in (rows | {"tied": tied(), "masked": masked()}).items()}


def logit_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two rows of logits: alike, far apart, and from 1 % to a few ulps apart."""

    def near(x, epsilon):
        return x, (x.astype(np.float64) + epsilon * rng.standard_normal(shape)).astype(dtype)

    def other(x):
        return np.where(np.isfinite(x), np.float64(3) * rng.standard_normal(shape), x).astype(dtype)

    rows = logit_rows(rng, shape, dtype)
    regimes = {name: (x, other(x)) for name, x in rows.items()}
    regimes |= {f"near {e:g}": near(rows["sigma 3"], e) for e in (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)}
    regimes |= {f"confident and near {e:g}": near(rows["ahead by 20"], e) for e in (1, 1e-2, 1e-4)}
    return regimes | {"masked and near": near(rows["masked"], 1e-3)}


def one_row_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray]]:
    return {name: (x,) for name, x in logit_rows(rng, shape, dtype).items()}


def soft_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Targets of every kind against logits of every kind."""
    logits = logit_rows(rng, shape, dtype)
    p = {name: pair[0] for name, pair in probability_regimes(rng, shape, dtype).items()}
    classes = np.broadcast_to(np.arange(shape[-1]), shape)
    p["one-hot"], p["one-hot, wrong"] = (classes == 0).astype(dtype), (classes == 1).astype(dtype)
    names = ["dirichlet 1", "one-hot", "peaked 0.0001", "zeros in p", "one-hot, wrong"]
    regimes = {}
    for i, (name, x) in enumerate(logits.items()):
        for target in (names[i % len(names)], "one-hot" if "ahead" in name else "peaked 0.01"):
            masked = np.where(np.isfinite(x), p[target], np.zeros((), dtype))
            regimes[f"{target}, {name}"] = (masked, x)
    return regimes


def binary_logit_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two logits: of every size, alike and apart."""
    x = 3 * rng.standard_normal(shape)
    sign = rng.choice([-1, 1], shape)
    regimes = {f"sigma {s}": (s * rng.standard_normal(shape), s * rng.standard_normal(shape)) for s in (1, 10)}
    regimes |= {f"near {e:g}": (x, x + e * rng.standard_normal(shape)) for e in (1, 1e-1, 1e-2, 1e-3, 1e-5, 1e-6)}
    regimes |= {f"at {v:g}": (sign * v, sign * v + rng.standard_normal(shape)) for v in (1e-6, 1e-2, 20, 40, 80)}
    regimes["small"] = tuple(10 ** rng.uniform(-15, -1, shape) * sign for _ in range(2))
    return {name: tuple(y.astype(dtype) for y in pair) for name, pair in regimes.items()}


def log_prob_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two log-probabilities: of every size, alike and apart, on both sides of where the series ends."""
    a = -rng.exponential(3, shape)
    sign = rng.choice([-1, 1], shape)
    deltas = {f"near {e:g}": e * rng.standard_normal(shape) for e in (1, 1e-1, 1e-2, 1e-3, 1e-5, 1e-7)}
    deltas |= {f"apart by {d:g}": sign * d for d in (1.5, 4, 20, 40, 80)}
    deltas["around the series' end"] = sign * (1.5 + 0.01 * rng.standard_normal(shape))
    regimes = {name: (a, a + d) for name, d in deltas.items()}
    regimes |= {"certain": (0 * a, -(10 ** rng.uniform(-15, 0, shape))), "unlikely": (30 * a, 30 * rng.permutation(a))}
    return {name: tuple(x.astype(dtype) for x in pair) for name, pair in regimes.items()}


def binary_soft_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A probability against a logit."""
    logits = binary_logit_regimes(rng, shape, dtype)
    alpha = {name: pair[0] for name, pair in binary_regimes(rng, shape, dtype).items()}
    regimes = {}
    for i, (name, (x, _)) in enumerate(logits.items()):
        target = ["uniform", "labels", "small", "near 1"][i % 4]
        regimes[f"{target}, {name}"] = (alpha[target], x)
        regimes[f"right, {name}"] = ((x > 0).astype(dtype), x)
    return regimes


@dataclass(frozen=True)
class Corner:
    """Arguments where a formula read literally is 0 · ∞ or 0 / 0, and the truth there."""

    arguments: tuple
    value: float
    gradient: tuple
    second_order: bool = True

    def holds_nan(self) -> bool:
        return any(np.isnan(x).any() for x in (*self.arguments, self.value, *self.gradient))


@dataclass(frozen=True, eq=False)  # hashed by identity
class Kernel:
    """A public function, its formula in mpmath, where to try it, and how close it must come.

    The formula takes one distribution an argument: a list (classes) or a number (elementwise). Bars are in ulps of the
    exact result, or of `value_scale` and `gradient_scale`, the sum of the absolute values of the closed form's terms,
    where that is given; those of `hvp_bar` are always scaled, by Σ |Hᵢⱼ vⱼ| or, where Hᵢⱼ is itself a sum whose terms
    cancel, by `hvp_scale` of the arguments and the direction. Derivatives are compared with the formula's where every
    number is inside its open domain; on the edge are the corners. `absent` is what an argument holds at a class that
    isn't there, None where there is no such number.
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
    listed: tuple[int, ...] = ()  # classes whose probability a value is made of, however small
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
        """The arguments by regime, each of the shape given; for elementwise rows its last axis is a batch axis too."""
        return {name: list(pair[: len(self.arguments)]) for name, pair in self.regimes(rng, shape, dtype).items()}


def label(kernel: Kernel) -> str:
    return f"{kernel.name}-{kernel.note}" if kernel.note else kernel.name


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


def jensen_shannon_divergence(p, q):
    b, c = mp.mpf(BETA), mp.mpf(1 - BETA)
    rows = [(pi, qi, b * pi + c * qi) for pi, qi in zip(p, q, strict=True)]
    return sum(b * weighted(pi, log_ratio(pi, m)) if pi else 0 for pi, _, m in rows) + sum(
        c * weighted(qi, log_ratio(qi, m)) if qi else 0 for _, qi, m in rows
    )


def two_classes(formula):
    """The binary form of a formula: p = {α, 1 - α}."""
    return lambda *numbers: formula(*([x, 1 - x] for x in numbers))


def log_ratio(p, q):
    return mp.log(p) - mp.log(q)


def softmax(x):
    m = max(x)
    e = [mp.exp(xi - m) for xi in x]
    z = sum(e)
    return [ei / z for ei in e]


def surprisals(x):
    """log 1/softmax(x), without a softmax that underflows to 0."""
    m = max(x)
    log_z = mp.log(sum(mp.exp(xi - m) for xi in x))
    return [m - xi + log_z for xi in x]


def entropy_with_logits(x):
    return sum(weighted(q, s) for q, s in zip(softmax(x), surprisals(x), strict=True))


def cross_entropy_with_logits(p, x):
    return sum(weighted(pi, s) for pi, s in zip(p, surprisals(x), strict=True))


def cross_entropy_with_label_0(x):
    return surprisals(x)[0]


def log_prob_of_label_0(x):
    return -surprisals(x)[0]


def log_prob_of_other_labels(x):
    """log(1 - q) of label 0, by the others' surprisals, which have all digits."""
    return mp.log(sum(mp.exp(-s) for s in surprisals(x)[1:])) if any(mp.isfinite(xi) for xi in x[1:]) else -mp.inf


def smoothed(x):
    s = surprisals(x)
    return mp.mpf(1 - SMOOTHING) * s[0] + mp.mpf(SMOOTHING) * sum(s) / len(s)


def log_sum(x):
    m = max(x)
    return m + mp.log(sum(mp.exp(xi - m) for xi in x))


def z_loss(x):
    return Z_LOSS * log_sum(x) ** 2


def label_0_with_z_loss(x):
    return surprisals(x)[0] + z_loss(x)


def soft_with_z_loss(p, x):
    return cross_entropy_with_logits(p, x) + z_loss(x)


def kl_divergence_with_logits(x, y):
    rows = zip(softmax(x), surprisals(x), surprisals(y), strict=True)
    return sum(p * (b - a) for p, a, b in rows if p)


def jensen_shannon_divergence_with_logits(x, y):
    return jensen_shannon_divergence(softmax(x), softmax(y))


def both_outcomes(x):
    """The logits of {σ(x), 1 - σ(x)}."""
    return [x, mp.mpf(0)]


def binary_entropy_with_logits(x):
    return entropy_with_logits(both_outcomes(x))


def binary_cross_entropy_with_logits(a, x):
    return cross_entropy_with_logits([a, 1 - a], both_outcomes(x))


def binary_kl_divergence_with_logits(x, y):
    return kl_divergence_with_logits(both_outcomes(x), both_outcomes(y))


def sampled_kl_divergence(a, b):
    return mp.exp(b - a) - 1 - (b - a)


# The label functions as functions of the logits alone, with label 0


def label_0(**options):
    @functools.wraps(jce.cross_entropy_with_integer_labels)
    def function(logits, *, axis=-1, **others):
        shape = list(np.shape(logits))
        if isinstance(axis, int) and -len(shape) <= axis < len(shape):
            del shape[axis]
        zeros = np.zeros if all(isinstance(k, int) for k in shape) else jnp.zeros  # an exported shape may be symbolic
        return jce.cross_entropy_with_integer_labels(zeros(shape, int), logits, axis=axis, **options, **others)

    return function


def log_prob(entry, *labels, **options):
    """An entry of the log-probabilities of these labels, in every distribution."""

    @functools.wraps(jce.log_probs_with_integer_labels)
    def function(logits, *, axis=-1, **others):
        shape = list(np.shape(logits))
        if isinstance(axis, int) and -len(shape) <= axis < len(shape):
            del shape[axis]
        of_each = jnp.broadcast_to(jnp.array(labels), (*shape, len(labels)))
        return jce.log_probs_with_integer_labels(of_each, logits, axis=axis, **options, **others)[..., entry]

    return function


def at_beta(function):
    """The function with unlike weights of p and q."""

    @functools.wraps(function)
    def weighing(p, q, **options):
        return function(p, q, beta=BETA, **options)

    return weighing


def penalized(function):
    """The function with a z-loss."""

    @functools.wraps(function)
    def with_penalty(p, logits, **options):
        return function(p, logits, z_loss=Z_LOSS, **options)

    return with_penalty


# The head's functions as functions of the logits, which are the bias of a head of zeros


def of_rows(of_row, function):
    @functools.wraps(function)
    def of_logits(*logits):
        *shape, n = np.shape(logits[0])
        rows = [jnp.reshape(x, (math.prod(shape), n)) for x in logits]
        return jax.vmap(of_row)(*rows).reshape(shape)

    return of_logits


def linear(row) -> jce.Linear:
    return jce.Linear(jnp.zeros(1, row.dtype), jnp.zeros((row.size, 1), row.dtype), row)


def with_label_0(function, statistic=lambda result: result, **options):
    def of_row(row):
        x = linear(row)
        return statistic(function(np.zeros((), int), x.hidden, x.head, x.bias, **options))

    return of_rows(of_row, function)


def mapped(function, **options):
    return of_rows(lambda row: jce.linear_map(function, linear(row), reduction="sum", **options), jce.linear_map)


SMOOTHING, BETA = 0.125, 0.125
Z_LOSS = 0.25
TAIL, LOG_Z = "tail", "log Z"


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def kl_gradient_scale(x, y):
    """p (|δ| + Σ p |δ| + KL): δ is known up to its mean."""
    p, delta = softmax(x), [a - b for a, b in zip(surprisals(x), surprisals(y), strict=True)]
    rest = sum(weighted(pi, abs(d)) for pi, d in zip(p, delta, strict=True)) + kl_divergence_with_logits(x, y)
    return [weighted(pi, abs(d) + rest) for pi, d in zip(p, delta, strict=True)]


def kl_hvp_scale(x, y, dx, dy):
    """The terms of d pᵢ(δᵢ - KL) and of d (qᵢ - pᵢ), with dpᵢ = pᵢ(dxᵢ - Σ p dx), and dqᵢ alike."""
    p, q, known = softmax(x), softmax(y), kl_gradient_scale(x, y)
    dp, dq = softmax_differential_scale(p, dx), softmax_differential_scale(q, dy)
    d_kl = sum(k * abs(a) + abs(qi - pi) * abs(b) for k, a, qi, pi, b in zip(known, dx, q, p, dy, strict=True))
    d_delta = sum(pi * abs(a) + qi * abs(b) for pi, a, qi, b in zip(p, dx, q, dy, strict=True)) + d_kl
    in_x = [
        weighted(pi, k / pi * dpi / pi + abs(a) + abs(b) + d_delta) if pi else mp.mpf(0)
        for pi, k, dpi, a, b in zip(p, known, dp, dx, dy, strict=True)
    ]
    return in_x, [a + b for a, b in zip(dp, dq, strict=True)]


def to_mixture(p, q, b):
    """log p/m and q/m, where p is possible."""
    rows = [(pi, qi, b * pi + (1 - b) * qi) for pi, qi in zip(p, q, strict=True)]
    return [log_ratio(pi, m) if pi else mp.mpf(0) for pi, _, m in rows], [qi / m if qi else 0 for _, qi, m in rows]


def jensen_shannon_gradient_scale(x, y, b):
    """β p (|log p/m| + Σ p |log p/m|)"""
    p = softmax(x)
    logs, _ = to_mixture(p, softmax(y), mp.mpf(b))
    mean = sum(weighted(pi, abs(k)) for pi, k in zip(p, logs, strict=True))
    return [b * weighted(pi, abs(k) + mean) for pi, k in zip(p, logs, strict=True)]


def jensen_shannon_hvp_scale(x, y, dx, dy, b=None):
    """The terms of d βp (log p/m - Σ p log p/m), with d log p/m = (1-β) q/m (d log p - d log q)."""
    if b is None:
        return jensen_shannon_hvp_scale(x, y, dx, dy, BETA), jensen_shannon_hvp_scale(y, x, dy, dx, 1 - BETA)
    p, q = softmax(x), softmax(y)
    logs, shares = to_mixture(p, q, mp.mpf(b))
    d_log_p, d_log_q = (
        [abs(ti) + sum(weighted(pi, abs(t)) for pi, t in zip(r, d, strict=True)) for ti in d]
        for r, d in ((p, dx), (q, dy))
    )
    mean = sum(weighted(pi, abs(k)) for pi, k in zip(p, logs, strict=True))
    d_logs = [(1 - b) * share * (i + j) for share, i, j in zip(shares, d_log_p, d_log_q, strict=True)]
    d_mean = sum(weighted(pi, i * (abs(k) + mean) + dk) for pi, i, k, dk in zip(p, d_log_p, logs, d_logs, strict=True))
    return [
        b * weighted(pi, i * (abs(k) + mean) + dk + d_mean)
        for pi, i, k, dk in zip(p, d_log_p, logs, d_logs, strict=True)
    ]


def softmax_differential_scale(q, t):
    mean = sum(weighted(qi, abs(ti)) for qi, ti in zip(q, t, strict=True))
    return [weighted(qi, abs(ti) + mean) for qi, ti in zip(q, t, strict=True)]


# The rows

LOGIT = (-INF, INF)
IMPOSSIBLE = [
    [NAN, 0.0, 0.0, 0.0],
    [0.0, 0.0, NAN, 0.0],
    [INF, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, INF],
    [-INF] * 4,
]  # logits of no distribution

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
            Corner(([-1e-9, 1.0],), NAN, ([NAN, -1.0],)),
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
            Corner(([-1e-9, 1.0], [0.5, 0.5]), LOG2, ([LOG2, LOG2], [2e-9, -2.0])),
            Corner(([-1.0, 2.0], [0.5, 0.25]), 3 * LOG2, ([LOG2, 2 * LOG2], [2.0, -8.0])),
            Corner(([0.0, 1.0], [-0.5, 0.5]), NAN, ([NAN, LOG2], [NAN, -2.0])),
            Corner(([0.5, 1.0], [-0.5, 0.5]), NAN, ([NAN, LOG2], [NAN, -2.0])),
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
            Corner(([-0.5, 1.0], [-0.5, 1.0]), NAN, ([NAN, 1.0], [NAN, -1.0])),
            Corner(([0.0, 1.0], [-0.5, 1.0]), NAN, ([NAN, 1.0], [NAN, -1.0])),
            Corner(([0.5, 1.0], [-0.5, 1.0]), NAN, ([NAN, 1.0], [NAN, -1.0])),
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
            Corner(([-0.5, 1.0], [-0.5, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([0.0, 1.0], [-0.5, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([NAN, 1.0], [1.0, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([1.0, 1.0], [NAN, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
        ],
    ),
    Kernel(
        function=at_beta(jce.jensen_shannon_divergence),
        arguments=("p", "q"),
        formula=jensen_shannon_divergence,
        value_bar=5,
        gradient_bar=(5, 5),
        hvp_bar=5,
        never_negative=True,
        corners=[
            Corner(
                ([0.0, 1.0], [0.5, 0.5]),
                (np.log(16 / 9) + 3.5 * np.log(64 / 63)) / 8,
                ([-INF, np.log(16 / 9) / 8], [7 / 8 * LOG8_7, 7 / 8 * np.log(8 / 9)]),
            ),
            Corner(
                ([1.0, -0.0], [0.0, 1.0]),
                3 / 8 * LOG2 + 7 / 8 * LOG8_7,
                ([3 / 8 * LOG2, -INF], [-INF, 7 / 8 * LOG8_7]),
            ),
            Corner(([0.0, 1.0], [0.0, 1.0]), 0.0, ([0.0, 0.0], [0.0, 0.0])),
            Corner(([0.5, 0.5], [0.5, 0.5]), 0.0, ([0.0, 0.0], [0.0, 0.0])),
            Corner(([0.0, 0.0], [0.0, 0.0]), 0.0, ([0.0, 0.0], [0.0, 0.0])),
            Corner(([-0.5, 1.0], [-0.5, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([0.0, 1.0], [-0.5, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([NAN, 1.0], [1.0, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
            Corner(([1.0, 1.0], [NAN, 1.0]), NAN, ([NAN, 0.0], [NAN, 0.0])),
        ],
    ),
    Kernel(
        function=jce.binary_entropy,
        arguments=("alpha",),
        has_classes=False,
        regimes=binary_regimes,
        domains=((0, 1),),
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
        domains=((0, 1), (0, 1)),
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
            Corner((0.0, -0.5), NAN, (NAN, NAN)),
            Corner((1.0, 1.5), NAN, (NAN, NAN)),
            Corner((-0.5, 0.5), LOG2, (0.0, 4.0)),
            Corner((1.5, 0.5), LOG2, (0.0, -4.0)),
            Corner((NAN, 0.5), NAN, (0.0, NAN)),
            Corner((0.5, NAN), NAN, (NAN, NAN)),
        ],
    ),
    Kernel(
        function=jce.binary_kl_divergence,
        arguments=("alpha", "beta"),
        has_classes=False,
        regimes=binary_regimes,
        domains=((0, 1), (0, 1)),
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
            Corner((-0.5, -0.5), NAN, (NAN, NAN)),
            Corner((1.5, 1.5), NAN, (NAN, NAN)),
            Corner((0.5, 1.5), NAN, (NAN, NAN)),
            Corner((NAN, 0.5), NAN, (NAN, NAN)),
            Corner((0.5, NAN), NAN, (NAN, NAN)),
        ],
    ),
    Kernel(
        function=jce.entropy_with_logits,
        arguments=("logits",),
        regimes=one_row_regimes,
        domains=(LOGIT,),
        absent=(-INF,),
        formula=entropy_with_logits,
        value_bar=4,
        gradient_bar=(5,),
        gradient_scale=(
            lambda x: [
                q * (s + h) for h in [entropy_with_logits(x)] for q, s in zip(softmax(x), surprisals(x), strict=True)
            ],
        ),
        hvp_bar=5,
        corners=[
            Corner(([0.0, 0.0, 0.0, 0.0],), 2 * LOG2, ([0.0] * 4,)),
            Corner(([0.0, 0.0, -INF, -INF],), LOG2, ([0.0] * 4,)),
            Corner(([1.0, -INF, -INF, -INF],), 0.0, ([0.0] * 4,)),
            Corner(([200.0, 0.0, 0.0, 0.0],), 0.0, ([0.0] * 4,)),
            Corner(([3e38, -3e38, 0.0, -INF],), 0.0, ([0.0] * 4,)),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=jce.cross_entropy_with_logits,
        arguments=("p", "logits"),
        regimes=soft_regimes,
        domains=((0, INF), LOGIT),
        absent=(0.0, -INF),
        formula=cross_entropy_with_logits,
        value_bar=4,
        gradient_bar=(4, 8),
        gradient_scale=(None, lambda p, x: [sum(p) * q + pi for pi, q in zip(p, softmax(x), strict=True)]),
        hvp_bar=10,
        corners=[
            Corner(([0.25] * 4, [0.0] * 4), 2 * LOG2, ([2 * LOG2] * 4, [0.0] * 4)),
            Corner(([1.0, 0.0, 0.0, 0.0], [1.0, -INF, -INF, -INF]), 0.0, ([0.0, INF, INF, INF], [0.0] * 4)),
            Corner(([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -INF, -INF]), LOG2, ([LOG2, LOG2, INF, INF], [-0.5, 0.5, 0, 0])),
            Corner(([0.0, 1.0, 0.0, 0.0], [0.0, -INF, 0.0, -INF]), INF, ([LOG2, INF, LOG2, INF], [0.5, -1, 0.5, 0])),
            Corner(([1.0, TINY, 0.0, 0.0], [0.0, -INF, -INF, -INF]), INF, ([0.0, INF, INF, INF], [0.0, -TINY, 0, 0])),
            Corner(([0.0] * 4, [0.0] * 4), 0.0, ([2 * LOG2] * 4, [0.0] * 4)),
            Corner(([1.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]), 0.0, ([0.0, 200, 200, 200], [0.0] * 4)),
            Corner(([-1e-9, 1.0, 0.0, 0.0], [0.0] * 4), 2 * LOG2, ([2 * LOG2] * 4, [0.25, -0.75, 0.25, 0.25])),
            Corner(([-1.0, 2.0, 0.0, 0.0], [0.0] * 4), 2 * LOG2, ([2 * LOG2] * 4, [1.25, -1.75, 0.25, 0.25])),
            Corner(([NAN, 0.0, 0.0, 0.0], [0.0] * 4), NAN, ([2 * LOG2] * 4, [NAN] * 4)),
            *[Corner(([0.25] * 4, x), NAN, ([NAN] * 4, [NAN] * 4)) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=penalized(jce.cross_entropy_with_logits),
        note="z-loss",
        arguments=("p", "logits"),
        regimes=soft_regimes,
        domains=((0, INF), LOGIT),
        absent=(0.0, -INF),
        formula=soft_with_z_loss,
        value_bar=4,
        value_scale=lambda p, x: cross_entropy_with_logits(p, x) + Z_LOSS * (max(map(abs, x)) + mp.log(len(x))) ** 2,
        gradient_bar=(4, 8),
        gradient_scale=(
            None,
            lambda p, x: [
                q * (sum(p) + 2 * Z_LOSS * (max(map(abs, x)) + mp.log(len(x)))) + pi
                for pi, q in zip(p, softmax(x), strict=True)
            ],
        ),
        hvp_bar=10,
        corners=[
            Corner(([0.25] * 4, [0.0] * 4), 2 * LOG2 + LOG2**2, ([2 * LOG2] * 4, [LOG2 / 4] * 4)),
            Corner(([1.0, 0.0, 0.0, 0.0], [1.0, -INF, -INF, -INF]), 0.25, ([0.0, INF, INF, INF], [0.5, 0.0, 0.0, 0.0])),
            Corner(
                ([0.0, 1.0, 0.0, 0.0], [0.0, -INF, 0.0, -INF]),
                INF,
                ([LOG2, INF, LOG2, INF], [LOG2 / 4 + 0.5, -1.0, LOG2 / 4 + 0.5, 0.0]),
            ),
            Corner(([0.0] * 4, [0.0] * 4), LOG2**2, ([2 * LOG2] * 4, [LOG2 / 4] * 4)),
            Corner(([1.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]), 1e4, ([0.0, 200, 200, 200], [100.0, 0.0, 0.0, 0.0])),
            Corner(([NAN, 0.0, 0.0, 0.0], [0.0] * 4), NAN, ([2 * LOG2] * 4, [NAN] * 4)),
            *[Corner(([0.25] * 4, x), NAN, ([NAN] * 4, [NAN] * 4)) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=label_0(),
        arguments=("logits",),
        regimes=one_row_regimes,
        domains=(LOGIT,),
        absent=(-INF,),
        formula=cross_entropy_with_label_0,
        value_bar=4,
        gradient_bar=(4,),
        hvp_bar=8,
        corners=[
            Corner(([0.0] * 4,), 2 * LOG2, ([-0.75, 0.25, 0.25, 0.25],)),
            Corner(([1.0, -INF, -INF, -INF],), 0.0, ([0.0] * 4,)),
            Corner(([0.0, 0.0, -INF, -INF],), LOG2, ([-0.5, 0.5, 0.0, 0.0],)),
            Corner(([-INF, 0.0, 0.0, -INF],), INF, ([-1.0, 0.5, 0.5, 0.0],)),
            Corner(
                ([20.0, 0.0, 0.0, -INF],), 4.1223072448771e-9, ([-4.1223072278834e-9, 2.0611536e-9, 2.0611536e-9, 0],)
            ),
            Corner(([-200.0, 0.0, -INF, -INF],), 200.0, ([-1.0, 1.0, 0.0, 0.0],)),
            Corner(([200.0, 0.0, 0.0, 0.0],), 0.0, ([0.0] * 4,)),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=label_0(label_smoothing=SMOOTHING),
        note="smoothed",
        arguments=("logits",),
        regimes=lambda *args: {name: x for name, x in one_row_regimes(*args).items() if name != "masked"},
        domains=(LOGIT,),
        absent=(None,),
        formula=smoothed,
        value_bar=4,
        gradient_bar=(8,),
        gradient_scale=(
            lambda x: [q + SMOOTHING / len(x) + (1 - SMOOTHING) * (i == 0) for i, q in enumerate(softmax(x))],
        ),
        hvp_bar=10,
        corners=[
            Corner(([0.0] * 4,), 2 * LOG2, ([-0.65625, 0.21875, 0.21875, 0.21875],)),
            Corner(([0.0, 0.0, -INF, -INF],), INF, ([-0.40625, 0.46875, -0.03125, -0.03125],)),
            Corner(([-INF, 0.0, 0.0, -INF],), INF, ([-0.90625, 0.46875, 0.46875, -0.03125],)),
            Corner(([200.0, 0.0, 0.0, 0.0],), 18.75, ([0.09375, -0.03125, -0.03125, -0.03125],)),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=label_0(z_loss=Z_LOSS),
        note="z-loss",
        arguments=("logits",),
        regimes=one_row_regimes,
        domains=(LOGIT,),
        absent=(-INF,),
        formula=label_0_with_z_loss,
        value_bar=4,
        gradient_bar=(8,),
        gradient_scale=(
            lambda x: [
                q * (1 + 2 * Z_LOSS * (max(map(abs, x)) + mp.log(len(x)))) + (i == 0) for i, q in enumerate(softmax(x))
            ],
        ),
        hvp_bar=10,
        corners=[
            Corner(([0.0] * 4,), 2 * LOG2 + LOG2**2, ([0.25 * (1 + LOG2) - 1, *[0.25 * (1 + LOG2)] * 3],)),
            Corner(([1.0, -INF, -INF, -INF],), 0.25, ([0.5, 0.0, 0.0, 0.0],)),
            Corner(([0.0, 0.0, -INF, -INF],), LOG2 + LOG2**2 / 4, ([LOG2 / 4 - 0.5, LOG2 / 4 + 0.5, 0.0, 0.0],)),
            Corner(([-INF, 0.0, 0.0, -INF],), INF, ([-1.0, LOG2 / 4 + 0.5, LOG2 / 4 + 0.5, 0.0],)),
            Corner(([200.0, 0.0, 0.0, 0.0],), 10_000.0, ([100.0, 0.0, 0.0, 0.0],)),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=jce.kl_divergence_with_logits,
        arguments=("p_logits", "q_logits"),
        regimes=logit_regimes,
        domains=(LOGIT, LOGIT),
        absent=(-INF, -INF),
        formula=kl_divergence_with_logits,
        value_bar=5,
        gradient_bar=(8, 4),
        gradient_scale=(
            lambda x, y: kl_gradient_scale(x, y),
            lambda x, y: [p + q for p, q in zip(softmax(x), softmax(y), strict=True)],
        ),
        hvp_bar=6,
        hvp_scale=kl_hvp_scale,
        never_negative=True,
        corners=[
            Corner(([0.0] * 4, [0.0] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([0.0] * 4, [5.0] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([0.0, 0.0, -INF, -INF], [0.0] * 4), LOG2, ([0.0] * 4, [-0.25, -0.25, 0.25, 0.25])),
            Corner(([1.0, -INF, -INF, -INF], [1.0, -INF, -INF, -INF]), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([LOWEST] * 4, [LOWEST] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([LOWEST] * 4, [0.0] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([0.0] * 4, [LOWEST] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(
                ([0.0] * 4, [0.0, 0.0, LOWEST, LOWEST]),
                -LOWEST / 2,
                ([LOWEST / 8, LOWEST / 8, -LOWEST / 8, -LOWEST / 8], [0.25, 0.25, -0.25, -0.25]),
                False,
            ),
            Corner(
                ([0.0, 0.0, -INF, -INF], [0.0, -INF, 0.0, -INF]),
                INF,
                ([-INF, INF, 0.0, 0.0], [0.0, -0.5, 0.5, 0.0]),
                False,
            ),
            *[Corner((x, [0.0] * 4), NAN, ([NAN] * 4, [NAN] * 4), False) for x in IMPOSSIBLE],
            *[Corner(([0.0] * 4, x), NAN, ([NAN] * 4, [NAN] * 4), False) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=at_beta(jce.jensen_shannon_divergence_with_logits),
        arguments=("p_logits", "q_logits"),
        regimes=logit_regimes,
        domains=(LOGIT, LOGIT),
        absent=(-INF, -INF),
        formula=jensen_shannon_divergence_with_logits,
        value_bar=6,
        gradient_bar=(8, 8),
        gradient_scale=(
            lambda x, y: jensen_shannon_gradient_scale(x, y, BETA),
            lambda x, y: jensen_shannon_gradient_scale(y, x, 1 - BETA),
        ),
        hvp_bar=8,
        hvp_scale=jensen_shannon_hvp_scale,
        never_negative=True,
        corners=[
            Corner(([0.0] * 4, [0.0] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([0.0] * 4, [5.0] * 4), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(([1.0, -INF, -INF, -INF], [1.0, -INF, -INF, -INF]), 0.0, ([0.0] * 4, [0.0] * 4)),
            Corner(
                ([0.0, 0.0, -INF, -INF], [0.0] * 4),
                (np.log(16 / 9) + 3.5 * np.log(64 / 63)) / 8,
                ([0.0] * 4, [7 / 64 * sign * np.log(9 / 7) for sign in (-1, -1, 1, 1)]),
            ),
            Corner(
                ([0.0, 0.0, -INF, -INF], [0.0, -INF, 0.0, -INF]),
                3 / 16 * LOG2 + 7 / 16 * LOG8_7,
                ([-3 / 32 * LOG2, 3 / 32 * LOG2, 0.0, 0.0], [-7 / 32 * LOG8_7, 0.0, 7 / 32 * LOG8_7, 0.0]),
            ),
            *[Corner((x, [0.0] * 4), NAN, ([NAN] * 4, [NAN] * 4), False) for x in IMPOSSIBLE],
            *[Corner(([0.0] * 4, x), NAN, ([NAN] * 4, [NAN] * 4), False) for x in IMPOSSIBLE],
        ],
    ),
    Kernel(
        function=jce.binary_entropy_with_logits,
        arguments=("logits",),
        has_classes=False,
        regimes=binary_logit_regimes,
        domains=(LOGIT,),
        formula=binary_entropy_with_logits,
        value_bar=4,
        gradient_bar=(5,),
        hvp_bar=5,
        hvp_scale=lambda x, v: (abs(v) * sigmoid(x) * sigmoid(-x) * (1 + abs(x * mp.tanh(x / 2))),),
        corners=[
            Corner((0.0,), LOG2, (0.0,)),
            Corner((INF,), 0.0, (0.0,)),
            Corner((-INF,), 0.0, (0.0,)),
            Corner((200.0,), 0.0, (0.0,)),
            Corner((NAN,), NAN, (NAN,)),
        ],
    ),
    Kernel(
        function=jce.binary_cross_entropy_with_logits,
        arguments=("alpha", "logits"),
        has_classes=False,
        regimes=binary_soft_regimes,
        domains=((0, 1), LOGIT),
        formula=binary_cross_entropy_with_logits,
        value_bar=4,
        gradient_bar=(0.5, 3),
        gradient_scale=(None, lambda a, x: [a * sigmoid(-x) + (1 - a) * sigmoid(x)]),
        hvp_bar=5,
        corners=[
            Corner((0.5, 0.0), LOG2, (0.0, 0.0)),
            Corner((1.0, INF), 0.0, (-INF, 0.0)),
            Corner((0.0, -INF), 0.0, (INF, 0.0)),
            Corner((0.0, INF), INF, (-INF, 1.0)),
            Corner((1.0, -INF), INF, (INF, -1.0)),
            Corner((TINY, -INF), INF, (INF, -TINY)),
            Corner((0.0, -20.0), 2.0611536e-9, (20.0, 2.0611536e-9)),
            Corner((1.0, 20.0), 2.0611536e-9, (-20.0, -2.0611536e-9)),
            Corner((-0.5, 0.0), LOG2, (0.0, 1.0)),
            Corner((1.5, 0.0), LOG2, (0.0, -1.0)),
            Corner((NAN, 0.0), NAN, (0.0, NAN)),
            Corner((0.5, NAN), NAN, (NAN, NAN)),
        ],
    ),
    Kernel(
        function=jce.binary_kl_divergence_with_logits,
        arguments=("alpha_logits", "beta_logits"),
        has_classes=False,
        regimes=binary_logit_regimes,
        domains=(LOGIT, LOGIT),
        formula=binary_kl_divergence_with_logits,
        value_bar=8,
        gradient_bar=(8, 8),
        hvp_bar=8,
        never_negative=True,
        corners=[
            Corner((0.0, 0.0), 0.0, (0.0, 0.0)),
            Corner((INF, INF), 0.0, (0.0, 0.0)),
            Corner((-INF, -INF), 0.0, (0.0, 0.0)),
            Corner((INF, -INF), INF, (0.0, -1.0)),
            Corner((-INF, INF), INF, (0.0, 1.0)),
            Corner((INF, 0.0), LOG2, (0.0, -0.5)),
            Corner((-INF, 0.0), LOG2, (0.0, 0.5)),
            Corner((0.0, INF), INF, (-INF, 0.5)),
            Corner((0.0, -INF), INF, (INF, -0.5)),
            Corner((NAN, 0.0), NAN, (NAN, NAN)),
            Corner((0.0, NAN), NAN, (NAN, NAN)),
        ],
    ),
    Kernel(
        function=jce.sampled_kl_divergence,
        arguments=("log_p", "log_q"),
        has_classes=False,
        regimes=log_prob_regimes,
        domains=(LOGIT, LOGIT),
        formula=sampled_kl_divergence,
        value_bar=4,
        gradient_bar=(4, 4),
        hvp_bar=4,
        never_negative=True,
        corners=[
            Corner((0.0, 0.0), 0.0, (0.0, 0.0)),
            Corner((-5.0, -5.0), 0.0, (0.0, 0.0)),
            Corner((-INF, -INF), 0.0, (0.0, 0.0)),
            Corner((LOWEST, LOWEST), 0.0, (0.0, 0.0)),
            Corner((-1.0, -INF), INF, (1.0, -1.0)),
            Corner((-INF, -1.0), INF, (-INF, INF)),
            Corner((-1e4, -1.0), INF, (-INF, INF)),
            Corner((-1.0, -100.0), 98.0, (1.0, -1.0)),
            Corner((0.0, LOWEST), -LOWEST, (1.0, -1.0), False),
            Corner((-1.0, -1.0 - 2.0**-20), 2.0**-41, (2.0**-20, -(2.0**-20))),
            Corner((NAN, -1.0), NAN, (NAN, NAN)),
            Corner((-1.0, NAN), NAN, (NAN, NAN)),
        ],
    ),
]


# A log-probability is minus a loss; the row of k labels has one that is no class, too, where there is one class.
LABEL = next(kernel for kernel in TABLE if kernel.name == "cross_entropy_with_integer_labels")
TABLE += [
    dataclasses.replace(
        LABEL,
        function=log_prob(0, 0, 1),
        note="of k labels",
        formula=log_prob_of_label_0,
        value_bar=6,
        gradient_bar=(5,),
        corners=[Corner(c.arguments, -c.value, tuple(-np.array(g) for g in c.gradient)) for c in LABEL.corners],
    ),
    dataclasses.replace(
        LABEL,
        function=log_prob(-1, 0, tail=True),
        note=TAIL,
        listed=(0,),
        formula=log_prob_of_other_labels,
        value_bar=6,
        gradient_bar=(5,),
        corners=[
            Corner(([0.0] * 4,), np.log(3 / 4), ([-1 / 4, 1 / 12, 1 / 12, 1 / 12],)),
            Corner(([1.0, -INF, -INF, -INF],), -INF, ([-1.0, 0.0, 0.0, 0.0],)),
            Corner(([-INF, 0.0, 0.0, -INF],), 0.0, ([0.0] * 4,)),
            Corner(([20.0, 0.0, 0.0, -INF],), LOG2 - 20, ([-1.0, 0.5, 0.5, 0.0],)),
            Corner(([200.0, 0.0, 0.0, 0.0],), np.log(3) - 200, ([-1.0, 1 / 3, 1 / 3, 1 / 3],)),
            Corner(([-20.0, 0.0, -INF, -INF],), -2.0611536e-9, ([-2.0611536e-9, 2.0611536e-9, 0.0, 0.0],)),
            Corner(([-200.0, 0.0, -INF, -INF],), 0.0, ([0.0] * 4,)),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
]


# For tests of every row


ROWS = {label(kernel): kernel for kernel in TABLE}
HEADS = [
    dataclasses.replace(
        ROWS["cross_entropy_with_integer_labels"], function=with_label_0(jce.linear_cross_entropy, reduction="sum")
    ),
    dataclasses.replace(
        ROWS["cross_entropy_with_integer_labels-smoothed"],
        function=with_label_0(jce.linear_cross_entropy, reduction="mean", label_smoothing=SMOOTHING),
    ),
    dataclasses.replace(
        ROWS["entropy_with_logits"], function=with_label_0(jce.linear_log_probs, lambda result: result.entropy)
    ),
    dataclasses.replace(
        ROWS["entropy_with_logits"],
        function=with_label_0(jce.linear_log_probs, lambda result: result.log_normalizer, log_normalizer=True),
        note=LOG_Z,
        formula=log_sum,
        value_bar=2,
        value_scale=lambda x: max(abs(xi) for xi in x if mp.isfinite(xi)) + mp.log(len(x)),
        gradient_scale=(None,),
        hvp_bar=8,
        corners=[
            Corner(([0.0] * 4,), 2 * LOG2, ([0.25] * 4,)),
            Corner(([1.0, -INF, -INF, -INF],), 1.0, ([1.0, 0.0, 0.0, 0.0],)),
            Corner(([0.0, -INF, -INF, 0.0],), LOG2, ([0.5, 0.0, 0.0, 0.5],)),
            Corner(([200.0, 0.0, 0.0, -INF],), 200.0, ([1.0, 0.0, 0.0, 0.0],)),
            Corner(([3e38, -3e38, 0.0, 0.0],), 3e38, ([1.0, 0.0, 0.0, 0.0],), False),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
    dataclasses.replace(
        ROWS["kl_divergence_with_logits"],
        function=of_rows(lambda p, q: jce.linear_kl_divergence(linear(p), linear(q)), jce.linear_kl_divergence),
    ),
    dataclasses.replace(
        ROWS["cross_entropy_with_integer_labels"],
        function=mapped(lambda x: jce.cross_entropy_with_integer_labels(0, x)),
    ),
]


KERNELS = TABLE + HEADS
# What any function of a head's tokens gives beside `linear_log_probs`, which is one, has quick tests of its own.
SLOW = ("linear_kl_divergence", "linear_map")
each_kernel = pytest.mark.parametrize(
    "kernel",
    [pytest.param(kernel, marks=[pytest.mark.slow] if kernel.name in SLOW else []) for kernel in KERNELS],
    ids=label,
)
each_function = pytest.mark.parametrize("kernel", TABLE, ids=label)
WITH_CLASSES = [kernel for kernel in TABLE if kernel.has_classes]
each_with_classes = pytest.mark.parametrize("kernel", WITH_CLASSES, ids=label)
OF_LOGITS = [kernel for kernel in WITH_CLASSES if LOGIT in kernel.domains]
each_of_logits = pytest.mark.parametrize("kernel", OF_LOGITS, ids=label)


def easy(kernel: Kernel, rng: np.random.Generator, shape: tuple[int, ...], dtype=np.float32) -> list[np.ndarray]:
    """Arguments without corners."""
    return next(iter(kernel.sample(rng, shape, dtype).values()))


def total(kernel: Kernel) -> Callable:
    return lambda *arguments: kernel.function(*arguments).sum()


@functools.cache
def gradient(kernel: Kernel) -> Callable:
    """The gradient in every argument, as a tuple; compiled as one."""
    return jax.jit(jax.grad(total(kernel), tuple(range(len(kernel.arguments)))))


def modes(function: Callable, positions: tuple[int, ...]) -> dict[str, Callable]:
    """Of a function with one number: programs of (arguments, directions), by name, to the third order."""

    def pushed(f):
        return lambda a, t: jax.jvp(lambda *a: f(*a), a, t)[1]

    def inner(u, v):
        return sum((x * y).sum() for x, y in zip(u, v, strict=True))

    gradient = jax.grad(function, positions)
    return {
        "value": lambda a, t: function(*a),
        "gradient": lambda a, t: jax.value_and_grad(function, positions)(*a),
        "jvp": lambda a, t: jax.jvp(function, a, t),
        "linearize": lambda a, t: jax.linearize(function, *a)[1](*t),
        "forward over reverse": lambda a, t: pushed(gradient)(a, t),
        "reverse over forward": lambda a, t: jax.grad(lambda a: pushed(function)(a, t))(a),
        "reverse over reverse": lambda a, t: jax.grad(lambda a: inner(gradient(*a), t))(a),
        "third order": lambda a, t: jax.grad(lambda a: pushed(lambda *a: pushed(function)(a, t))(a, t))(a),
    }


def op_by_op():
    """Without jit; but not under jax_debug_nans, where a NaN is one too that a select leaves out."""
    return contextlib.nullcontext() if jax.config.jax_debug_nans else jax.disable_jit()
