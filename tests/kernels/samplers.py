"""Arguments for tests, by regime: similar, far apart, nearly certain, tiny, with large offsets."""

from __future__ import annotations

import numpy as np

INF, NAN = np.inf, np.nan
TINY = 2.0**-126  # the smallest normal float32
LOWEST = float(np.finfo(np.float32).min)  # many programs use this number instead of -∞


def normalize(x: np.ndarray, dtype) -> np.ndarray:
    """Rows in the dtype that sum to 1. Subnormal numbers are replaced by 0, since XLA on a CPU treats them as 0."""
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
    """Logits with every spread and offset. Class 0, the label in the rows for label functions, is ahead or behind."""
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
    """Pairs of rows of logits: far apart, and similar, with differences from about 1 down to a few ulps."""

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
    """Targets of every kind, each with logits of every kind."""
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
    """Pairs of logits of every size, similar and far apart."""
    x = 3 * rng.standard_normal(shape)
    sign = rng.choice([-1, 1], shape)
    regimes = {f"sigma {s}": (s * rng.standard_normal(shape), s * rng.standard_normal(shape)) for s in (1, 10)}
    regimes |= {f"near {e:g}": (x, x + e * rng.standard_normal(shape)) for e in (1, 1e-1, 1e-2, 1e-3, 1e-5, 1e-6)}
    regimes |= {f"at {v:g}": (sign * v, sign * v + rng.standard_normal(shape)) for v in (1e-6, 1e-2, 20, 40, 80)}
    regimes["small"] = tuple(10 ** rng.uniform(-15, -1, shape) * sign for _ in range(2))
    return {name: tuple(y.astype(dtype) for y in pair) for name, pair in regimes.items()}


def log_prob_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of log-probabilities of every size, similar and far apart.

    Some are on both sides of the difference 1.5, up to which the divergence is computed as a series.
    """
    a = -rng.exponential(3, shape)
    sign = rng.choice([-1, 1], shape)
    deltas = {f"near {e:g}": e * rng.standard_normal(shape) for e in (1, 1e-1, 1e-2, 1e-3, 1e-5, 1e-7)}
    deltas |= {f"apart by {d:g}": sign * d for d in (1.5, 4, 20, 40, 80)}
    deltas["around the series' end"] = sign * (1.5 + 0.01 * rng.standard_normal(shape))
    regimes = {name: (a, a + d) for name, d in deltas.items()}
    regimes |= {"certain": (0 * a, -(10 ** rng.uniform(-15, 0, shape))), "unlikely": (30 * a, 30 * rng.permutation(a))}
    return {name: tuple(x.astype(dtype) for x in pair) for name, pair in regimes.items()}


def binary_soft_regimes(rng, shape, dtype) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of a probability and a logit."""
    logits = binary_logit_regimes(rng, shape, dtype)
    alpha = {name: pair[0] for name, pair in binary_regimes(rng, shape, dtype).items()}
    regimes = {}
    for i, (name, (x, _)) in enumerate(logits.items()):
        target = ["uniform", "labels", "small", "near 1"][i % 4]
        regimes[f"{target}, {name}"] = (alpha[target], x)
        regimes[f"right, {name}"] = ((x > 0).astype(dtype), x)
    return regimes
