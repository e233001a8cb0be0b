"""The scales from the tests' table, for many rows at once in float64. If a result is a sum whose terms cancel, its
error is divided by this scale. A test compares each scale with the table's, which uses mpmath and takes one row at a
time.

Also the effect of rounding a logit, as the table defines it. A search off the grid subtracts this effect.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.kernels import BETA, LOGIT, SMOOTHING, Z_LOSS, Kernel

EPS, TINY = 2.0**-23, 2.0**-1000
NEAR = 1.5  # for |log q/p| up to this, q - p isn't computed from q and p (`jce/_numerics/deviance.py`)


class Softmax:
    """For rows of logits: probabilities p, surprisals, and `rest`, which is 1 - p. All are accurate in float64."""

    def __init__(self, x: np.ndarray):
        self.at_max = np.arange(x.shape[-1]) == x.argmax(-1, keepdims=True)
        depth = x.max(-1, keepdims=True) - x
        self.weights = np.exp(-depth)
        others = self.but_the_largest(self.weights)
        z = 1 + others
        self.p, self.surprisal = self.weights / z, depth + np.log1p(others)
        self.rest = np.where(self.at_max, others, z - self.weights) / z

    def but_the_largest(self, x: np.ndarray) -> np.ndarray:
        return np.where(self.at_max, 0, x).sum(-1, keepdims=True)

    def mean(self, x: np.ndarray) -> np.ndarray:
        return (self.p * x).sum(-1, keepdims=True)

    def other(self, x: np.ndarray) -> np.ndarray:
        """For each class, Σ p x over all other classes."""
        terms = self.p * x
        return np.where(self.at_max, self.but_the_largest(terms), terms.sum(-1, keepdims=True) - terms)

    def differential(self, t: np.ndarray) -> np.ndarray:
        """The terms of dpᵢ = pᵢ(tᵢ - Σ p t)."""
        return self.p * (np.abs(t) + self.mean(np.abs(t)))

    def jacobian(self, t: np.ndarray) -> np.ndarray:
        """Σⱼ |∂pᵢ/∂xⱼ tⱼ|"""
        return self.p * (self.rest * np.abs(t) + self.other(np.abs(t)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def is_label(x: np.ndarray) -> np.ndarray:
    return np.arange(x.shape[-1]) == 0


def most_log_sum(x: np.ndarray) -> np.ndarray:
    """max |x| + log n: the scale of log Σ exp x, whose terms may cancel."""
    return np.abs(x).max(-1, keepdims=True) + np.log(x.shape[-1])


def deviance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p log p/q - p + q"""
    log = np.where(p < q / 2, np.log(p / q), np.log1p((p - q) / q))
    return np.where(p > 0, p * log - (p - q), q)


def entropy_gradient(x: np.ndarray) -> np.ndarray:
    q = Softmax(x)
    return q.p * (q.surprisal + q.mean(q.surprisal))


def entropy_hvp(x: np.ndarray, t: np.ndarray) -> list[np.ndarray]:
    """Σⱼ |tⱼ| times the terms of Hᵢⱼ = ∂pᵢ/∂xⱼ (sᵢ - H - 1) - pᵢ pⱼ (sⱼ - H). s: surprisals. At some x they cancel."""
    q, t = Softmax(x), np.abs(t)
    beyond = np.abs(q.surprisal - q.mean(q.surprisal))
    return [q.jacobian(t) * (beyond + 1) + q.p * q.mean(beyond * t)]


def soft_target_hvp(p: np.ndarray, x: np.ndarray, dp: np.ndarray, dx: np.ndarray) -> list[np.ndarray]:
    q, dp, dx = Softmax(x), np.abs(dp), np.abs(dx)
    in_p = q.rest * dx + q.other(dx)
    all_dp = dp.sum(-1, keepdims=True)
    return [in_p, q.p * (all_dp - dp) + q.rest * dp + p.sum(-1, keepdims=True) * q.jacobian(dx)]


def kl_gradient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = Softmax(x)
    delta = p.surprisal - Softmax(y).surprisal
    return p.p * (np.abs(delta) + p.mean(np.abs(delta)) + np.maximum(p.mean(-delta), 0))


def kl_hvp(x: np.ndarray, y: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    p, q, known = Softmax(x), Softmax(y), kl_gradient(x, y)
    dp, dq, dx, dy = p.differential(dx), q.differential(dy), np.abs(dx), np.abs(dy)
    d_kl = (known * dx + np.abs(q.p - p.p) * dy).sum(-1, keepdims=True)
    d_delta = p.mean(dx) + q.mean(dy) + d_kl
    return [known * dp / p.p + p.p * (dx + dy + d_delta), dp + dq]


def jensen_shannon_gradient(x: np.ndarray, y: np.ndarray, b: float) -> np.ndarray:
    p, q = Softmax(x), Softmax(y)
    log = np.abs(np.log1p((1 - b) * (q.p - p.p) / p.p))
    return b * p.p * (log + p.mean(log))


def jensen_shannon(b: float) -> dict[str, Callable]:
    return {
        "∂p_logits": lambda x, y: jensen_shannon_gradient(x, y, b),
        "∂q_logits": lambda x, y: jensen_shannon_gradient(y, x, 1 - b),
    }


def logistic_gradient(alpha: np.ndarray, x: np.ndarray) -> np.ndarray:
    return alpha * sigmoid(-x) + (1 - alpha) * sigmoid(x)


def logistic_hvp(alpha: np.ndarray, x: np.ndarray, da: np.ndarray, dx: np.ndarray) -> list[np.ndarray]:
    return [np.abs(dx), np.abs(da) + sigmoid(x) * sigmoid(-x) * np.abs(dx)]


HVP = "HVP"  # its scale takes arguments and directions, and returns a list with one array per argument
# By the label of the table's row. Errors of quantities that aren't listed are relative to the result.
SCALES: dict[str, dict[str, Callable]] = {
    "entropy": {"∂p": lambda p: np.abs(np.log(p)) + 1},
    "kl_divergence": {
        "value": lambda p, q: deviance(p, q).sum(-1) + np.abs((p - q).sum(-1)),
        "∂p": lambda p, q: np.abs(np.log(p / q)) + 1,
    },
    "binary_entropy": {"∂alpha": lambda a: np.abs(np.log(a)) + np.abs(np.log1p(-a))},
    "binary_kl_divergence": {
        "∂alpha": lambda a, b: np.abs(np.log(a / b)) + np.abs(np.log1p(-a) - np.log1p(-b)),
    },
    "entropy_with_logits": {"∂logits": entropy_gradient, HVP: entropy_hvp},
    "cross_entropy_with_logits": {
        "∂logits": lambda p, x: p.sum(-1, keepdims=True) * Softmax(x).p + p,
        HVP: soft_target_hvp,
    },
    "cross_entropy_with_logits-z-loss": {
        "value": lambda p, x: np.sum(p * Softmax(x).surprisal, -1) + Z_LOSS * np.square(most_log_sum(x))[..., 0],
        "∂logits": lambda p, x: (p.sum(-1, keepdims=True) + 2 * Z_LOSS * most_log_sum(x)) * Softmax(x).p + p,
    },
    "cross_entropy_with_integer_labels": {HVP: lambda x, t: [Softmax(x).jacobian(t)]},
    "cross_entropy_with_integer_labels-smoothed": {
        "∂logits": lambda x: Softmax(x).p + SMOOTHING / x.shape[-1] + (1 - SMOOTHING) * is_label(x),
    },
    "cross_entropy_with_integer_labels-∂label_smoothing": {"value": lambda x: np.ptp(x, axis=-1)},
    "cross_entropy_with_integer_labels-z-loss": {
        "∂logits": lambda x: Softmax(x).p * (1 + 2 * Z_LOSS * most_log_sum(x)) + is_label(x),
    },
    "kl_divergence_with_logits": {
        "∂p_logits": kl_gradient,
        "∂q_logits": lambda x, y: Softmax(x).p + Softmax(y).p,
        HVP: kl_hvp,
    },
    "jensen_shannon_divergence_with_logits": jensen_shannon(BETA),
    "jensen_shannon_divergence_with_logits-beta 1/2": jensen_shannon(0.5),
    "binary_cross_entropy_with_logits": {"∂logits": logistic_gradient, HVP: logistic_hvp},
    "linear_log_probs-entropy": {"∂logits": entropy_gradient},
}


def spacing(x: np.ndarray) -> np.ndarray:
    """The distance from |x| to the next float32, for |x| in its normal range."""
    return np.ldexp(1.0, np.frexp(x)[1] - 24)


def conditioning(kernel: Kernel, arguments: list[np.ndarray], each: bool) -> np.ndarray | float:
    """The effect of rounding xᵢ - max x, in ulps, for each class or for the row, like `tests.oracle.conditioning`.

    But this function takes all terms that are summed besides the largest, not only the second largest: others may be
    rounded by more. For two rows it adds the effects.
    """
    lost_in_all = 0.0
    for x, domain in zip(arguments, kernel.domains, strict=True):
        if domain == LOGIT and kernel.has_classes:
            depth = x.max(-1, keepdims=True) - x
            lost = half_an_ulp(depth) / (EPS / 2)
            second = np.take_along_axis(lost, np.argsort(depth, axis=-1)[..., 1:2], -1)
            q = Softmax(x)
            of_sum = q.but_the_largest(q.weights * lost) / np.maximum(q.but_the_largest(q.weights), TINY)
            of_row = np.maximum(second, of_sum) + lost[..., list(kernel.listed)].sum(-1, keepdims=True)
            lost_in_all = lost_in_all + (of_row + lost if each else of_row[..., 0])
    return lost_in_all


def half_an_ulp(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 0, spacing(x) / 2)


def of_difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The error of log qᵢ/pᵢ from rounding each logit's distance to its row's maximum. If the two logits are near each
    other, it is only the error of rounding their difference, because q - p is then computed from this difference."""
    depths = sum(half_an_ulp(z.max(-1, keepdims=True) - z) for z in (x, y))
    return np.where(np.abs(y - x) < NEAR, np.minimum(depths, half_an_ulp(y - x)), depths)


def lost_of_differences(key: str, arguments: list[np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By quantity: the effect of `of_difference` on a divergence of two rows of logits and on its derivatives, and the
    effect of rounding the terms of its sums, where any class may have the largest term."""
    if key not in WEIGHTS:
        return {}
    lost, (p, q) = of_difference(*arguments), map(Softmax, arguments)
    of_p, of_q = (half_an_ulp(x.max(-1, keepdims=True) - x) for x in arguments)
    b, c = WEIGHTS[key]
    middle = b * p.p + c * q.p if c else q.p
    logs = [np.abs(np.log1p((middle - r.p) / r.p)) for r in (p, q)]
    terms = b * deviance(p.p, middle) * of_p + c * deviance(q.p, middle) * of_q
    in_value = np.abs(exact["∂q_logits"]) * lost + terms
    lost = lost + (np.abs(q.p - p.p) * (of_p + of_q)).sum(-1, keepdims=True)  # every log q/p has log Σ p e^d
    of_p, of_q = (logs[0] * of_p, logs[1] * of_q) if c == 0 else (log * (of_p + of_q) for log in logs)  # of p and of m
    return {
        "value": in_value.sum(-1),
        "∂p_logits": b * p.p * (lost + of_p + p.mean(lost + of_p)),
        "∂q_logits": c * q.p * (lost + of_q + q.mean(lost + of_q)),
    }


# The weights of the two divergences to the middle. If there is only one divergence, it is to the other row.
WEIGHTS = {
    "kl_divergence_with_logits": (1, 0),
    "jensen_shannon_divergence_with_logits": (BETA, 1 - BETA),
    "jensen_shannon_divergence_with_logits-beta 1/2": (0.5, 0.5),
}
