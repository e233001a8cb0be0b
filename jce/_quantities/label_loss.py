"""A label's loss at logits x, smoothed and with a z-loss: (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζ (log Σ exp xᵢ)².

The excess is the derivative of the loss with respect to the logits: q minus the target, plus the derivative of the
z-loss. For any number m per row, let eᵢ = exp(xᵢ - m), Z = Σ eᵢ over all classes, and s = Σ eᵢ over all classes except
the label y. Then qᵢ = eᵢ/Z and q_y - 1 = -s/Z, and Z times the excess is

    at other classes    eᵢ (1 + 2ζ log Σ exp x) - ε Z/n
    at the label        -s + ε (Z - Z/n) + 2ζ e_y log Σ exp x

At ε = 0, nothing cancels in these formulas. `of_row` evaluates them, for rows of logits and for heads. `_excess` has
the same value, written with softmax(x): the derivatives of the excess are taken from `_excess`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jce._jax.arguments import is_array
from jce._numerics.calculus import custom_jvp, def_at_once, sum_of_tangents
from jce._numerics.elementary import exp, log
from jce._numerics.mul0 import mul0
from jce._quantities.soft_targets import scaled, scaled_square, smoothed, surprisal_terms
from jce._quantities.z_loss import penalty_slope
from jce._softmax.kernel import kernel, storing_kernel
from jce._softmax.softmax import logsumexp, softmax, surprisal_at_label
from jce._softmax.sums import OffLabel


def or_none(number):
    """The number, or None for a Python 0, so that its term costs nothing."""
    return number if is_array(number) or number != 0 else None


class OfRow(NamedTuple):
    """Numbers per row: the loss, Z, and the numbers from which Z times the excess is computed.

    Z times the excess is `at_label` at the label, and eᵢ · factor - taken at other classes. None stands for a `factor`
    of 1 and for a `taken` of 0.
    """

    losses: Array
    z: Array
    factor: Array | None
    taken: Array | None
    at_label: Array

    def entries(self, e: Array, column: Callable) -> Array:
        e = e if self.factor is None else e * column(self.factor)
        return e if self.taken is None else e - column(self.taken)


def of_row(
    off: OffLabel, n, mean: Array | None, smoothing, z_loss, *, whole: Callable = lambda log_sum: log_sum
) -> OfRow:
    """The loss of each row of n classes, and the numbers for its excess.

    `mean` is the mean of x - m over the classes. Only smoothing needs it, and then m must be the maximum. If the caller
    subtracted a number from the logits x of a row, `whole` adds it back to log Σ exp x.
    """
    m, s, d = off
    losses, at_label, z, e_y = surprisal_at_label(off), -s, off.z, exp(-d)
    # If the label outweighs the others, log Z is computed as log 1/q_y - d, since s + e^-d may have lost s to rounding.
    log_z = jnp.where(s < e_y, losses - d, log(z))
    factor = taken = None
    if smoothing is not None and mean is not None:
        losses, taken = smoothed(losses, log_z - mean, smoothing), smoothing * (z / n)
        at_label += smoothing * (z - z / n)
    if z_loss is not None:
        log_sum = whole(m + log_z)
        losses += scaled_square(z_loss, log_sum)
        at_label += 2 * z_loss * log_sum * e_y
        factor = 1 + 2 * z_loss * log_sum
    return OfRow(losses, z, factor, taken, at_label)


@functools.partial(custom_jvp, nondiff_argnums=(5,))
@kernel
def label_loss(y, x, smoothing, kept, z_loss, backend):
    """The loss of labels y. ε and ζ are arrays, or None for 0. `kept` is 1 for each class that counts, and 0 for each
    masked class, whose logit is -∞. It is None if all classes count."""
    if z_loss is not None:
        backend = backend.for_log_sum(x)
    # The mean for smoothing needs the maximum, so the label's sum uses the maximum too.
    off = backend.off_label_of_any_shift(y, x) if smoothing is None else backend.off_label(y, x)
    return _of_row(off, x, smoothing, kept, z_loss, backend).losses


def _of_row(off, x, smoothing, kept, z_loss, backend):
    if smoothing is None:
        return of_row(off, 1, None, None, z_loss)
    return of_row(off, _count(kept, x, backend), -_mean_depth(off, x, kept, backend), smoothing, z_loss)


def _count(kept, x, classes):
    return classes.count(x) if kept is None else jnp.maximum(classes.sum(kept), 1)


def _uniform(kept, x, classes):
    """uᵢ = 1/n for each class that counts, and 0 for masked classes."""
    n = _count(kept, x, classes)
    return jnp.asarray(1 / n, x.dtype) if kept is None else kept / classes.column(n)


def _mean_depth(off, x, kept, backend):
    """Σ uᵢ (m - xᵢ). Each term is weighted before the sum, since Σ (m - xᵢ) over many classes may overflow."""
    u = _uniform(kept, x, backend)
    if kept is None:
        return -backend.sum(u * (x - backend.column(off.m)))
    return backend.sum(
        surprisal_terms(u, off.m + (off.s - off.s), x, backend)
    )  # unlike m, s is NaN in a row with a NaN


# ∂/∂ε = 1/n Σᵢ log 1/qᵢ - log 1/q_y, ∂/∂ζ = (log Σ exp x)²
def _label_loss_rule(classes, primals, tangents):
    y, x, _, kept, _ = primals
    _, dx, d_smoothing, _, d_z_loss = tangents
    losses, excess = _loss_and_excess(*primals, classes)
    return losses, sum_of_tangents(
        (dx, d_smoothing, d_z_loss),
        lambda t: classes.sum(mul0(excess, t)),
        lambda t: scaled(t, mean_excess(y, x, kept, classes)),
        lambda t: scaled_square(t, logsumexp(x, classes)),
    )


label_loss.defjvp(_label_loss_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(5,))
def _loss_and_excess(y, x, smoothing, kept, z_loss, classes):
    # With a z-loss, a GPU doesn't use a chain (`chain.py`): it stores arrays, and both results may be computed from
    # them.
    in_rows = kernel if z_loss is None else storing_kernel
    return in_rows(_at_once)(y, x, smoothing, kept, z_loss, classes)


def _at_once(y, x, smoothing, kept, z_loss, backend):
    if z_loss is not None:
        backend = backend.for_log_sum(x)
    if smoothing is None:
        off, e = backend.exponentials_off_label(y, x)
    else:
        off = backend.off_label(y, x)
        e = exp(backend.depth_off_label(x, off))
    row = _of_row(off, x, smoothing, kept, z_loss, backend)
    entries = row.entries(e, backend.column)  # also at masked classes: nothing differentiates their logits of -∞
    return row.losses, jnp.where(
        backend.is_at(x, backend.local(y, x)), backend.column(row.at_label), entries
    ) / backend.column(row.z)


def _excess(y, x, smoothing, kept, z_loss, classes):
    """The excess, as an expression whose derivatives are accurate."""
    q = softmax(x, classes)
    target = classes.is_at(x, classes.local(y, x)).astype(x.dtype)
    if smoothing is not None:
        target += scaled(smoothing, _uniform(kept, x, classes) - target)
    if z_loss is not None:
        q += penalty_slope(x, z_loss, classes)
    return q - target


def_at_once(_loss_and_excess, label_loss, _excess)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def mean_excess(y, x, kept, backend):
    """1/n Σᵢ log 1/qᵢ - log 1/q_y, computed as the mean of m - xᵢ, minus m - x_y. Near the uniform distribution both
    losses are about log Z, and subtracting them would lose all digits."""
    off = backend.off_label(y, x)
    return _mean_depth(off, x, kept, backend) - off.d


# d = t_y - 1/n Σᵢ tᵢ, and NaN where the row is NaN and t isn't 0
@mean_excess.defjvp
def _mean_excess_rule(classes, primals, tangents):
    y, _, kept = primals
    t, excess = tangents[1], mean_excess(*primals, classes)
    nan = classes.broadcast(jnp.where(jnp.isnan(excess), excess, jnp.zeros_like(excess)), t)
    weighted = classes.sum(mul0(nan - _uniform(kept, t, classes), t))
    return excess, classes.at(t, classes.local(y, t)) + weighted
