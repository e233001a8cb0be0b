"""softmax(x), log 1/softmax(x) and their derivatives, right to a few ulps also where one class takes nearly everything.

With m = max x and eᵢ = exp(xᵢ - m), the normalizer is Z = Σ eᵢ = 1 + s, where s is the sum over all classes but one
maximal one: the off-maximum sum. At a margin of 40, s = 4e-18 has all its digits where Z has rounded to 1, so

    log 1/qᵢ = (m - xᵢ) + log(1 + s)        1 - qᵢ = (s + (1 - eᵢ)) / Z

keep theirs. A class with logit -∞ has probability 0. A NaN, a +∞ or nothing but -∞ makes a row NaN.

How the sums are written decides their speed. On a CPU, XLA gives a reduction to a library with a fixed set of
operations: a compare, a select or an iota inside one is first written to memory, N × n numbers of it. So masks are said
in arithmetic here: min(eᵢ, 2|i - y|) leaves out class y, since eᵢ ≤ 1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._classes import Classes
from jce._mul0 import mul0

# Classes. XLA's fusion goes by the number of rows, which vmap hides; long rows are where few fit in memory.
LONG_ROW = 4096


def maximum(x: Array, classes: Classes) -> Array:
    """m = max x, and NaN where it is +∞."""
    m = classes.max(x)
    return jnp.where(m == jnp.inf, jnp.full_like(m, jnp.nan), m)


def another(m: Array, s: Array, classes: int = LONG_ROW) -> Array:
    """The number m again, to be broadcast for another pass over the logits; s ≥ 0 is a result of the pass before.

    What two passes share, N × n numbers, XLA stores on a CPU unless it fuses both. So m is said as max(m, m - s), which
    XLA can't see through, and the pass computes its own. Sums over short rows are better off shared.
    """
    return jnp.maximum(m, m - s) if classes >= LONG_ROW else m


def off_maximum_sum(x: Array, classes: Classes) -> tuple[Array, Array]:
    """m, and s = Σ exp(xᵢ - m) over all classes but one of those where x = m."""
    m = maximum(x, classes)
    e = jnp.exp(x - classes.column(m))
    # eᵢ - ⌊eᵢ⌋ is 0 at a maximal class, eᵢ at any other. Of t maximal classes all are left out: t - 1 are missing.
    s = classes.sum(e - jnp.floor(e))
    z = classes.sum(jnp.exp(x - classes.column(another(m, s, x.shape[classes.axis]))))
    return m, s + jnp.floor(z - s - 0.5)


def off_label_sum(labels: Array, x: Array, classes: Classes) -> tuple[Array, Array, Array]:
    """m, s = Σ exp(xᵢ - m) over all classes but the label, and x at the label; NaN for a label out of range.

    There are no ties to count: Z = 1 + (s - (1 - e)) with the label's e, and where that isn't 1, s is at least 1.
    """
    m = maximum(x, classes)
    m = jnp.where((labels >= 0) & (labels < classes.count(x)), m, jnp.full_like(m, jnp.nan))
    y = classes.local(labels, x)
    s = classes.sum(jnp.minimum(jnp.exp(x - classes.column(m)), _distance(y, x, classes)))
    return m, s, classes.at(x, y)


def _distance(y, x, classes):
    """2|i - y|, exactly: 0 at the label, and elsewhere above every eᵢ ≤ 1."""
    n = x.shape[classes.axis]
    exact = classes.count(x) <= 2 ** jnp.finfo(x.dtype).nmant
    # Behind the barrier the class index is an array in memory; without, an iota in the sum.
    index = lax.optimization_barrier(2 * jnp.arange(n, dtype=x.dtype if exact else y.dtype))
    index = index.reshape([n if a == x.ndim + classes.axis else 1 for a in range(x.ndim)])
    return jnp.abs(index - classes.column(2 * y).astype(index.dtype)).astype(x.dtype)


# softmax and its logarithm, as functions of x to be differentiated


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: Array, classes: Classes) -> Array:
    """qᵢ = eᵢ/Z."""
    m, s = off_maximum_sum(x, classes)
    return jnp.exp(x - classes.column(another(m, s))) / classes.column(1 + s)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@softmax.defjvp
def _softmax_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    q = softmax(x, classes)
    return q, mul0(q, centered(t, x, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def complement(x: Array, classes: Classes) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    m, s = off_maximum_sum(x, classes)
    return (classes.column(s) + (1 - jnp.exp(x - classes.column(another(m, s))))) / classes.column(1 + s)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, classes), -mul0(softmax(x, classes), centered(t, x, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def surprisal(x: Array, classes: Classes) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    m, s = off_maximum_sum(x, classes)
    log_z = jnp.log1p(s)
    return classes.column(log_z) - (x - classes.column(another(m, log_z, x.shape[classes.axis])))


# d log 1/qᵢ = -(tᵢ - Σⱼ qⱼtⱼ)
@surprisal.defjvp
def _surprisal_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return surprisal(x, classes), -centered(t, x, classes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def logsumexp(x: Array, classes: Classes) -> Array:
    """log Σ exp xᵢ = m + log(1 + s)."""
    m, s = off_maximum_sum(x, classes)
    return m + jnp.log1p(s)


# d log Σ exp xᵢ = Σ qᵢtᵢ
@logsumexp.defjvp
def _logsumexp_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return logsumexp(x, classes), classes.sum(mul0(softmax(x, classes), t))


def centered(t: Array, x: Array, classes: Classes) -> Array:
    """tᵢ - Σⱼ qⱼtⱼ, linear in t.

    As uᵢ - Σⱼ qⱼuⱼ with u = t - t at the maximal class: there u is 0, and the sum of the small rest has its digits.
    """
    top = lax.stop_gradient((x == classes.column(classes.max(x))).astype(x.dtype))
    u = t - classes.column(classes.sum(mul0(top / classes.column(classes.sum(top)), t)))
    return u - classes.column(classes.sum(mul0(softmax(x, classes), u)))
