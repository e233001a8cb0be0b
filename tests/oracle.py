"""A formula's exact value and derivatives at the stored floats, computed in mpmath, and errors in ulps."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import mpmath as mp
import numpy as np

from tests.kernels import LOGIT, Kernel


def precision(kernel: Kernel, row):
    """A context with enough bits to add the smallest number to a sum, shift it by a step, or subtract it from 1."""
    if LOGIT in kernel.domains:
        return mp.workprec(400)
    if not kernel.has_classes:  # a derivative that is 0 at α = β near 1 must come out below the normal range
        return mp.workprec(450 if np.result_type(*row) == np.float32 else 1300)
    smallest = min((abs(x) for x in np.concatenate(row) if x), default=1)
    return mp.workprec(300 + max(0, -int(np.frexp(smallest)[1])))


def to_mp(row):
    """The row in mpmath: each argument is a list (a distribution) or a number."""
    return tuple([mp.mpf(float(x)) for x in a] if np.ndim(a) else mp.mpf(float(a)) for a in row)


def shifted(row, *shifts):
    """The row with `amount` added to entry `place` of argument `argument`, for each shift."""
    row = [list(a) if isinstance(a, list) else a for a in row]
    for argument, place, amount in shifts:
        if isinstance(row[argument], list):
            row[argument][place] += amount
        else:
            row[argument] += amount
    return tuple(row)


def entries(row):
    """(argument, place, value) for every number in the row."""
    return [(i, j, x) for i, a in enumerate(row) for j, x in enumerate(a if isinstance(a, list) else [a])]


def step(x):
    """The step of a central difference at x: 2^-(bits / 2), since the difference's error is the square of the step.

    If |x| < 1, the step is relative to x.
    """
    return x / max(1, abs(x)) * mp.mpf(2) ** -(mp.mp.prec // 2)


def partial(formula, row, entry):
    """∂formula/∂entry; the entry is not 0."""
    i, j, x = entry
    h, nothing = step(x), mp.mpf(2) ** (60 - mp.mp.prec)
    with enough_bits_for(h):
        difference = formula(*shifted(row, (i, j, h))) - formula(*shifted(row, (i, j, -h)))
        return mp.chop(difference / (2 * h), nothing)  # for an exact 0, the difference is tiny instead


def second_partial(formula, row, a, b):
    """∂²formula/∂a∂b; the entries are not 0."""
    h, k = step(a[2]), step(b[2])
    with enough_bits_for(h * k):
        at = [formula(*shifted(row, (*a[:2], s * h), (*b[:2], t * k))) for s in (1, -1) for t in (1, -1)]
        return (at[0] - at[1] - at[2] + at[3]) / (4 * h * k)


def hessian(formula, row, some) -> list[list]:
    """∂²formula for each pair of the given entries."""
    lower = [[second_partial(formula, row, a, b) for b in some[: i + 1]] for i, a in enumerate(some)]
    return [[lower[max(i, j)][min(i, j)] for j in range(len(some))] for i in range(len(some))]


def enough_bits_for(change):
    """The precision at which the effect of a change of this size on a value near 1 has the usual number of bits."""
    return mp.workprec(mp.mp.prec + max(0, -mp.mag(change)))


def distributions(kernel: Kernel, *arrays) -> list[tuple]:
    """One tuple per distribution, or per number if elementwise, with its part of each array."""
    if kernel.has_classes:
        return list(zip(*(np.asarray(x).reshape(-1, x.shape[-1]) for x in arrays), strict=True))
    return list(zip(*(np.asarray(x).ravel() for x in arrays), strict=True))


def conditioning(kernel: Kernel, row, dtype, j: int | None = None) -> float:
    """The error of exp(xᵢ - max x), in ulps, if xᵢ - max x is rounded by half an ulp. It is added to every bar.

    Only the terms that matter count: the second largest one, which dominates the sum without the maximum, the term
    of the differentiated entry, and the classes in `kernel.listed`.
    """
    worst = 0.0
    for x, domain in zip(row, kernel.domains, strict=True):
        if domain == LOGIT and kernel.has_classes:
            ordered = sorted(x)
            own = [x[i] for i in (*kernel.listed, *([] if j is None else [j]))]
            depths = [ordered[-1] - y for y in ordered[-2:-1] + own]
            lost = sum(spacing(float(d), dtype) for d in depths if d and mp.isfinite(d))
            with np.errstate(over="ignore"):
                worst = max(worst, lost / np.finfo(dtype).eps)
    return worst


def interior(kernel: Kernel, row) -> Iterator[tuple]:
    """The entries where a central difference of the formula gives its derivative. Edge cases are tested separately."""
    for i, j, x in entries(row):
        at_j = [a[j] if isinstance(a, list) else a for a in row]
        inside = [low < y < high for y, (low, high) in zip(at_j, kernel.domains, strict=True)]
        # The derivative with respect to a logit exists for every finite weight of its class, even 0.
        if x and inside[i] and (all(inside) or (kernel.domains[i] == LOGIT and all(map(mp.isfinite, at_j)))):
            yield i, j, x


def ulps(got, exact, scale, dtype) -> float:
    """|got - exact| in spacings of the dtype at the scale. A wrong NaN or infinity counts as infinitely many."""
    if mp.isinf(exact) or mp.isnan(exact):
        return 0.0 if float(got) == float(exact) or (np.isnan(got) and mp.isnan(exact)) else np.inf
    if not np.isfinite(got):
        return np.inf
    return float(abs(mp.mpf(float(got)) - exact) / spacing(float(abs(scale)), dtype))


def spacing(x, dtype):
    """The distance from |x| to the next number of the dtype, also for the dtypes of ml_dtypes."""
    info = jnp.finfo(dtype)
    with np.errstate(divide="ignore"):
        return np.exp2(np.maximum(np.floor(np.log2(np.abs(x))), info.minexp) - info.nmant)
