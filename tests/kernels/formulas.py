"""The formulas in mpmath, for lists or numbers. A `..._scale` is the sum of the magnitudes of a derivative's terms."""

from __future__ import annotations

import mpmath as mp

SMOOTHING, BETA = 0.125, 0.125
Z_LOSS = 0.25


def log_inverse(q):
    """log 1/q, with +∞ at 0."""
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
    """log(1 - q) for label 0, computed from the surprisals of the other classes, which stay accurate."""
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


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def kl_gradient_scale(x, y):
    """p (|δ| + Σ p |δ| + KL), the scale of the gradient p (-δ - KL) with δ = log q/p. The term Σ p |δ| stands for the
    rounding error that all δ of a row share."""
    p, delta = softmax(x), [a - b for a, b in zip(surprisals(x), surprisals(y), strict=True)]
    rest = sum(weighted(pi, abs(d)) for pi, d in zip(p, delta, strict=True)) + kl_divergence_with_logits(x, y)
    return [weighted(pi, abs(d) + rest) for pi, d in zip(p, delta, strict=True)]


def kl_hvp_scale(x, y, dx, dy):
    """The terms of d pᵢ(δᵢ - KL) and of d (qᵢ - pᵢ), with dpᵢ = pᵢ(dxᵢ - Σ p dx), and dqᵢ likewise."""
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
    """log p/m, with 0 where p is 0, and q/m."""
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
