"""A formula's exact value and derivatives on the exact stored floats, in mpmath; and errors in ulps."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import mpmath as mp
import numpy as np

from tests.kernels import LOGIT, Kernel


def precision(kernel: Kernel, row):
    """A context with bits for what the smallest number adds to a sum, does to its differences, and leaves of 1."""
    if LOGIT in kernel.domains:
        return mp.workprec(400)
    if not kernel.has_classes:  # a derivative that is 0 at α = β near 1 must come out below the normal range
        return mp.workprec(450 if np.result_type(*row) == np.float32 else 1300)
    smallest = min((abs(x) for x in np.concatenate(row) if x), default=1)
    return mp.workprec(300 + max(0, -int(np.frexp(smallest)[1])))


def to_mp(row):
    """One distribution an argument, or one number."""
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
    """(argument, place, value) of every number in the row."""
    return [(i, j, x) for i, a in enumerate(row) for j, x in enumerate(a if isinstance(a, list) else [a])]


def step(x):
    """Of a central difference at x, which is off by the square of it: half of the bits, relative below 1."""
    return x / max(1, abs(x)) * mp.mpf(2) ** -(mp.mp.prec // 2)


def partial(formula, row, entry):
    """∂formula/∂entry; the entry is not 0."""
    i, j, x = entry
    h, nothing = step(x), mp.mpf(2) ** (60 - mp.mp.prec)
    with enough_bits_for(h):
        difference = formula(*shifted(row, (i, j, h))) - formula(*shifted(row, (i, j, -h)))
        return mp.chop(difference / (2 * h), nothing)  # what the step leaves of an exact 0


def second_partial(formula, row, a, b):
    """∂²formula/∂a∂b; the entries are not 0."""
    h, k = step(a[2]), step(b[2])
    with enough_bits_for(h * k):
        at = [formula(*shifted(row, (*a[:2], s * h), (*b[:2], t * k))) for s in (1, -1) for t in (1, -1)]
        return (at[0] - at[1] - at[2] + at[3]) / (4 * h * k)


def hessian(formula, row, some) -> list[list]:
    """∂²formula of each two of some entries."""
    lower = [[second_partial(formula, row, a, b) for b in some[: i + 1]] for i, a in enumerate(some)]
    return [[lower[max(i, j)][min(i, j)] for j in range(len(some))] for i in range(len(some))]


def enough_bits_for(change):
    """The precision at which what a change of this size does to a value near 1 is right to the usual precision."""
    return mp.workprec(mp.mp.prec + max(0, -mp.mag(change)))


def distributions(kernel: Kernel, *arrays) -> list[tuple]:
    """One tuple a distribution, or a number: its part of each array."""
    if kernel.has_classes:
        return list(zip(*(np.asarray(x).reshape(-1, x.shape[-1]) for x in arrays), strict=True))
    return list(zip(*(np.asarray(x).ravel() for x in arrays), strict=True))


def conditioning(kernel: Kernel, row, dtype, j: int | None = None) -> float:
    """What the rounding of xᵢ - max x, half an ulp of it, does to exp(xᵢ - max x), in ulps: added to every bar.

    Of the terms that matter: the largest but one, of which the off-maximum sum consists, a derivative's own, and what
    the table lists.
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
    """The entries where a central difference of the formula is its derivative; the corners are tested apart."""
    for i, j, x in entries(row):
        at_j = [a[j] if isinstance(a, list) else a for a in row]
        inside = [low < y < high for y, (low, high) in zip(at_j, kernel.domains, strict=True)]
        # The derivative in a logit exists whatever finite weight is beside it, also 0.
        if x and inside[i] and (all(inside) or (kernel.domains[i] == LOGIT and all(map(mp.isfinite, at_j)))):
            yield i, j, x


def ulps(got, exact, scale, dtype) -> float:
    """|got - exact| in spacings of the dtype at the scale; NaN and a wrong infinity count as infinitely many."""
    if mp.isinf(exact) or mp.isnan(exact):
        return 0.0 if float(got) == float(exact) or (np.isnan(got) and mp.isnan(exact)) else np.inf
    if not np.isfinite(got):
        return np.inf
    return float(abs(mp.mpf(float(got)) - exact) / spacing(float(abs(scale)), dtype))


def spacing(x, dtype):
    """The distance from |x| to the next number of the dtype, ml_dtypes' included."""
    info = jnp.finfo(dtype)
    with np.errstate(divide="ignore"):
        return np.exp2(np.maximum(np.floor(np.log2(np.abs(x))), info.minexp) - info.nmant)
