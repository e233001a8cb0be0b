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

from jce._calculus import ratio
from jce._classes import Classes
from jce._mul0 import mul0, multiply

LONG_ROW = 128  # classes


def maximum(x: Array, classes: Classes) -> Array:
    """m = max x, and NaN where it is +∞."""
    m = classes.max(x)
    return jnp.where(m == jnp.inf, m - m, m)


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
    z = classes.sum(jnp.exp(x - classes.column(another(m, s, classes.count_here(x)))))
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
    exact = classes.count(x) <= 2 ** jnp.finfo(x.dtype).nmant
    # Behind the barrier the class index is an array in memory; without, an iota in the sum.
    index = lax.optimization_barrier(2 * jnp.arange(classes.count_here(x), dtype=x.dtype if exact else y.dtype))
    index = classes.fold(jnp.expand_dims(index, range(1, -classes.axis)))
    index = jnp.expand_dims(index, range(x.ndim - index.ndim))
    return jnp.abs(index - classes.column(2 * y).astype(index.dtype)).astype(x.dtype)


# softmax and its logarithm, as functions of x to be differentiated


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: Array, classes: Classes) -> Array:
    """qᵢ = eᵢ/Z."""
    return _exponential(x, 1, classes) / classes.column(_normalizer(x, classes))


@softmax.defjvp
def _softmax_rule(classes, primals, tangents):
    return softmax(*primals, classes), softmax_tangent(tangents[0], primals[0], classes)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
def softmax_tangent(t: Array, x: Array, classes: Classes, scale: Array | None = None) -> Array:
    """dqᵢ along t, or that times a number a row."""
    z, u, mean = deviation(t, x, classes)
    r = ratio(jnp.ones_like(z) if scale is None else scale, z)
    q = _exponential(x, 4, classes) * classes.column(r)
    return unless_nan(z, mul0(q, u - classes.column(mean)), t, classes)


def centered(t: Array, x: Array, classes: Classes) -> Array:
    """tᵢ - Σⱼ qⱼtⱼ, linear in t."""
    z, u, mean = deviation(t, x, classes)
    return unless_nan(z, u - classes.column(mean), t, classes)


def deviation(t, x, classes):
    """Z, u = t - t at the maximal class (the mean of those at ties), and Σⱼ qⱼuⱼ.

    Where a class has nearly all of q, its u is 0, and the sum of the small rest has its digits.
    """
    z = _normalizer(x, classes)
    # ⌊eᵢ⌋ is 1 at a maximal class, 0 at any other.
    ties, top = classes.sum(jnp.floor(_exponential(x, 1, classes))), jnp.floor(_exponential(x, 2, classes))
    u = t - classes.column(multiply(1 / ties, classes.sum(multiply(top, t))))
    mean = multiply(ratio(jnp.ones_like(z), z), classes.sum(multiply(_exponential(x, 3, classes), u)))
    return z, u, mean


def unless_nan(z, tangent, t, classes):
    """A row of NaN is NaN along t, but 0 where t = 0, which its sums can't say."""
    zero = lax.stop_gradient(classes.column(z - z))  # or NaN; a constant NaN would be one for jax_debug_nans
    nan = mul0(jnp.broadcast_to(zero, t.shape), t)
    return jnp.where(classes.column(jnp.isfinite(z)), tangent, nan)


def _normalizer(x, classes):
    """Z = Σ eᵢ ≥ 1."""
    return classes.sum(_exponential(x, 0, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _exponential(x, k, classes):
    """eᵢ = exp(xᵢ - m), for a constant m, in the pass number k over x, of which each says m in another way."""
    m = maximum(x, classes)
    if k:
        m = another(m, k * classes.sum(jnp.exp(x - classes.column(m))), classes.count_here(x))
    return jnp.exp(x - classes.column(m))


# deᵢ = eᵢtᵢ
@_exponential.defjvp
def _exponential_rule(k, classes, primals, tangents):
    e = _exponential(*primals, k, classes)
    return e, mul0(e, tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def complement(x: Array, classes: Classes) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    m, s = off_maximum_sum(x, classes)
    return (classes.column(s) + (1 - jnp.exp(x - classes.column(another(m, s))))) / classes.column(1 + s)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, classes), -softmax_tangent(t, x, classes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def surprisal(x: Array, classes: Classes) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    m, s = off_maximum_sum(x, classes)
    log_z = jnp.log1p(s)
    return classes.column(log_z) - (x - classes.column(another(m, log_z, classes.count_here(x))))


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
