"""softmax(x), log 1/softmax(x) and their derivatives, right to a few ulps also where one class takes nearly everything.

With m = max x and eᵢ = exp(xᵢ - m), the normalizer is Z = Σ eᵢ = 1 + s, where s is the sum over all classes but one
maximal one: the off-maximum sum. At a margin of 40, s = 4e-18 has all its digits where Z has rounded to 1, so

    log 1/qᵢ = (m - xᵢ) + log(1 + s)        1 - qᵢ = (s + (1 - eᵢ)) / Z

keep theirs. A class with logit -∞ has probability 0. A NaN, a +∞ or nothing but -∞ makes a row NaN.

How the sums are written decides their speed. On a CPU, XLA gives a reduction to a library with a fixed set of
operations: a compare, a select or an iota inside one is first written to memory, N × n numbers of it. So masks are said
in arithmetic here: min(eᵢ, |i - y|) leaves out class y, since eᵢ ≤ 1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._mul0 import mul0

# Classes. XLA's fusion goes by the number of rows, which vmap hides; long rows are where few fit in memory.
LONG_ROW = 4096


def column(r: Array, axis: int) -> Array:
    """A number a row, to be broadcast along the class axis."""
    return jnp.expand_dims(r, axis)


def maximum(x: Array, axis: int) -> Array:
    """m = max x, and NaN where it is +∞."""
    m = x.max(axis)
    return jnp.where(m == jnp.inf, jnp.full_like(m, jnp.nan), m)


def another(m: Array, s: Array, classes: int = LONG_ROW) -> Array:
    """The number m again, to be broadcast for another pass over the logits; s ≥ 0 is a result of the pass before.

    What two passes share, N × n numbers, XLA stores on a CPU unless it fuses both. So m is said as max(m, m - s), which
    XLA can't see through, and the pass computes its own. Sums over short rows are better off shared.
    """
    return jnp.maximum(m, m - s) if classes >= LONG_ROW else m


def off_maximum_sum(x: Array, axis: int) -> tuple[Array, Array]:
    """m, and s = Σ exp(xᵢ - m) over all classes but one of those where x = m."""
    m = maximum(x, axis)
    e = jnp.exp(x - column(m, axis))
    # eᵢ - ⌊eᵢ⌋ is 0 at a maximal class, eᵢ at any other. Of t maximal classes all are left out: t - 1 are missing.
    s = (e - jnp.floor(e)).sum(axis)
    z = jnp.exp(x - column(another(m, s, x.shape[axis]), axis)).sum(axis)
    return m, s + jnp.floor(z - s - 0.5)


def off_label_sum(labels: Array, x: Array, axis: int) -> tuple[Array, Array, Array]:
    """m, s = Σ exp(xᵢ - m) over all classes but the label, and x at the label; NaN for a label out of range.

    There are no ties to count: Z = 1 + (s - (1 - e)) with the label's e, and where that isn't 1, s is at least 1.
    """
    n = x.shape[axis]
    m = maximum(x, axis)
    m = jnp.where((labels >= 0) & (labels < n), m, jnp.full_like(m, jnp.nan))
    s = jnp.minimum(jnp.exp(x - column(m, axis)), _distance(labels, x, axis)).sum(axis)
    return m, s, jnp.take_along_axis(x, column(labels, axis), axis, mode="clip").squeeze(axis)


def _distance(labels, x, axis):
    """|i - label|, exactly."""
    n = x.shape[axis]
    exact = n <= 2 ** (jnp.finfo(x.dtype).nmant + 1)
    # Behind the barrier the class index is an array in memory; without, an iota in the sum.
    index = lax.optimization_barrier(jnp.arange(n, dtype=x.dtype if exact else labels.dtype))
    index = index.reshape([n if a == x.ndim + axis else 1 for a in range(x.ndim)])
    return jnp.abs(index - column(labels, axis).astype(index.dtype)).astype(x.dtype)


# softmax and its logarithm, as functions of x to be differentiated


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: Array, axis: int) -> Array:
    """qᵢ = eᵢ/Z."""
    m, s = off_maximum_sum(x, axis)
    return jnp.exp(x - column(another(m, s), axis)) / column(1 + s, axis)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@softmax.defjvp
def _softmax_rule(axis, primals, tangents):
    (x,), (t,) = primals, tangents
    q = softmax(x, axis)
    return q, mul0(q, centered(t, x, axis))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def complement(x: Array, axis: int) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    m, s = off_maximum_sum(x, axis)
    return (column(s, axis) + (1 - jnp.exp(x - column(another(m, s), axis)))) / column(1 + s, axis)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(axis, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, axis), -mul0(softmax(x, axis), centered(t, x, axis))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def surprisal(x: Array, axis: int) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    m, s = off_maximum_sum(x, axis)
    log_z = jnp.log1p(s)
    return column(log_z, axis) - (x - column(another(m, log_z, x.shape[axis]), axis))


# d log 1/qᵢ = -(tᵢ - Σⱼ qⱼtⱼ)
@surprisal.defjvp
def _surprisal_rule(axis, primals, tangents):
    (x,), (t,) = primals, tangents
    return surprisal(x, axis), -centered(t, x, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def logsumexp(x: Array, axis: int) -> Array:
    """log Σ exp xᵢ = m + log(1 + s)."""
    m, s = off_maximum_sum(x, axis)
    return m + jnp.log1p(s)


# d log Σ exp xᵢ = Σ qᵢtᵢ
@logsumexp.defjvp
def _logsumexp_rule(axis, primals, tangents):
    (x,), (t,) = primals, tangents
    return logsumexp(x, axis), mul0(softmax(x, axis), t).sum(axis)


def centered(t: Array, x: Array, axis: int) -> Array:
    """tᵢ - Σⱼ qⱼtⱼ, linear in t.

    As uᵢ - Σⱼ qⱼuⱼ with u = t - t at the maximal class: there u is 0, and the sum of the small rest has its digits.
    """
    top = lax.stop_gradient((x == x.max(axis, keepdims=True)).astype(x.dtype))
    u = t - mul0(top / top.sum(axis, keepdims=True), t).sum(axis, keepdims=True)
    return u - mul0(softmax(x, axis), u).sum(axis, keepdims=True)
