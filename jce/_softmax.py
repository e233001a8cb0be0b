"""softmax(x), log 1/softmax(x) and their derivatives, right to a few ulps also where one class takes nearly everything.

With m = max x and eᵢ = exp(xᵢ - m), the normalizer is Z = Σ eᵢ = 1 + s, where s is the sum over all classes but one
maximal one: the off-maximum sum. At a margin of 40, s = 4e-18 has all its digits where Z has rounded to 1, so

    log 1/qᵢ = (m - xᵢ) + log(1 + s)        1 - qᵢ = (s + (1 - eᵢ)) / Z

keep theirs. A class with logit -∞ has probability 0. A NaN, a +∞ or nothing but -∞ makes a row NaN.

Where x is made in the same program, each pass may see it with another rounding (`_arguments.py` says why), so that
nowhere may x = m be asked for: xᵢ - m is some ulps of m off 0 at the maximum. Two facts do without. If Z < 3/2, one
class dominates: it is the only one with eᵢ > 1/2, so it can be told with a margin, and there xᵢ - m is 0 and eᵢ is 1 by
definition. If Z ≥ 3/2, no formula cancels: s is Z - 1, and all are of the form log Z - (xᵢ - m) or eᵢ/Z, in which
whatever m is drops out.

How the sums are written decides their speed. On a CPU, XLA gives a reduction to a library with a fixed set of
operations: a compare, a select or an iota inside one, or in what is made of one for the next, is first written to
memory, N × n numbers of it, and so is a constant that two passes share. So masks are said in arithmetic here:
min(eᵢ, 2|i - y|) leaves out class y, since eᵢ ≤ 1, and eᵢ ⌊7/4 - eᵢ⌋ those of eᵢ > 3/4. Where rows are short, the
library is slow at two more things: an argument that meets a result, and a constant that doesn't meet an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jce._calculus import custom_jvp, ratio
from jce._classes import Classes
from jce._elementary import exp, log1p
from jce._mul0 import mul0, multiply

FINE = 2.0**12  # how finely a weight is rounded that only centers a tangent


def maximum(x: Array, classes: Classes) -> Array:
    """m = max x, and NaN where it is +∞."""
    m = classes.max(x)
    return jnp.where(m == jnp.inf, m - m, m)


def another(m: Array, s: Array, few: bool = False) -> Array:
    """The number m again, to be broadcast for another pass over the logits; s ≥ 0 is a result of the pass before.

    What two passes share, N × n numbers, XLA stores on a CPU unless it fuses both. So m is said as max(m, m - s), which
    XLA can't see through, and the pass computes its own. Sums over few classes are better off shared.
    """
    return m if few else jnp.maximum(m, m - s)


class Normalizer(NamedTuple):
    """m = max x, and the off-maximum sum s, of each row: Σ exp(xᵢ - m) = 1 + s = Z."""

    m: Array
    s: Array

    @property
    def z(self) -> Array:
        return 1 + self.s

    @property
    def log_z(self) -> Array:
        return log1p(self.s)

    @property
    def shared(self) -> Array:
        """0 where one class dominates, with more than 2/3 of q, and 1 or more where none does."""
        return jnp.floor(self.s + 0.5)

    def depth(self, x: Array, classes: Classes) -> Array:
        """xᵢ - m ≤ 0, and exactly 0 at a class that dominates."""
        # That class has d > -0.3, where 2d + 0.6 is above 0. All others have d < log 1/2, where it is below d. Behind
        # the barrier these numbers, also the constants, are computed once a row, and this pass's own.
        m, lift, zero = map(classes.column, lax.optimization_barrier((self.m, 0.6 - 1e30 * self.shared, 0 * self.s)))
        d = x - m
        depth = jnp.minimum(jnp.maximum(d + (d + lift), d), zero)
        return depth if classes.mesh_axis is None else with_derivative_of(depth, jnp.maximum(d, jnp.finfo(d.dtype).min))

    def surprisal(self, x: Array, classes: Classes) -> Array:
        """log 1/qᵢ = log Z - (xᵢ - m)"""
        return classes.column(self.log_z) - self.depth(x, classes)

    def depth_and_dominant(self, x: Array, m: Array, classes: Classes) -> tuple[Array, Array]:
        """The same for an elementwise pass, which may select, and with its own m; and where the class dominates."""
        d = x - classes.column(m)
        dominant = d > classes.column(self.shared - 0.5)
        return jnp.where(dominant, jnp.zeros_like(d), d), dominant


def normalizer(x: Array, classes: Classes) -> Normalizer:
    m = maximum(x, classes)
    z = classes.sum(exp(x - classes.column(m)))
    e = exp(x - classes.column(another(m, z, classes.are_few(x))))
    most = jnp.maximum(1.75, -z)  # 7/4: a number a row, since a constant would be shared with another array's sum
    s = classes.sum(e * jnp.floor(classes.column(most) - e))
    # s where Z < 3/2, Z - 1 beyond. Between 1.4 and 1.53 they are the same.
    s = jnp.maximum(s, jnp.minimum(z - 1, 4 * z - 5.6))
    return Normalizer(m, s if classes.mesh_axis is None else with_derivative_of(s, z))


def with_derivative_of(a: Array, b: Array) -> Array:
    """a, with b's derivative: of where m is a constant, as it is over devices, a sum without the maximal class has not
    all of its own. Rules don't need it, but JAX before 0.12 forgets them in the head's loop."""
    return lax.stop_gradient(a) + (b - lax.stop_gradient(b))


def off_label_sum(labels: Array, x: Array, classes: Classes) -> tuple[Array, Array, Array]:
    """m, s = Σ exp(xᵢ - m) over all classes but the label, and d = m - x at the label; NaN for a label out of range."""
    y, n = classes.local(labels, x), classes.count(x)
    if classes.masks:
        m, s, x_y = here = _off_label_sum_here(y, x, classes)
        if classes.mesh_axis is not None:
            m = lax.pmax(lax.stop_gradient(m), classes.mesh_axis)
            s, x_y = classes.over_devices(s * exp(here[0] - m)), classes.over_devices(x_y)
    else:
        m = maximum(x, classes)
        s = classes.sum(jnp.minimum(exp(x - classes.column(m)), _distance(y, x, classes)))
        x_y = classes.at(x, y)
    m = jnp.where((labels >= 0) & (labels < n), m, jnp.full_like(m, jnp.nan))
    return m, s, m - x_y


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def _off_label_sum_here(y, x, classes):
    """m, s and x at the label, of this device's classes, in one reduction: a sum is scaled anew where a larger maximum
    is met."""
    least = jnp.finfo(x.dtype).min

    def merged(a, b):
        (m_a, s_a, y_a), (m_b, s_b, y_b) = a, b
        m = jnp.maximum(m_a, m_b)
        finite = jnp.maximum(m, least)
        return m, s_a * exp(m_a - finite) + s_b * exp(m_b - finite), y_a + y_b

    is_label, zero = classes.is_at(x, y), jnp.zeros_like(x)
    each = x, jnp.where(is_label, zero, jnp.ones_like(x)), jnp.where(is_label, x, zero)
    first = jnp.asarray(-jnp.inf, x.dtype), jnp.zeros((), x.dtype), jnp.zeros((), x.dtype)
    return lax.reduce(each, first, merged, (x.ndim + classes.axis,))


# For a constant m, ds = Σ eᵢtᵢ over the others. For loops: JAX before 0.12 differentiates those as plain code.
@_off_label_sum_here.defjvp
def _off_label_sum_here_rule(classes, primals, tangents):
    (y, x), (_, t) = primals, tangents
    m, s, x_y = _off_label_sum_here(y, x, classes)
    is_label, zero = classes.is_at(x, y), jnp.zeros_like(x)
    e = jnp.where(is_label, zero, exp(x - classes.column(lax.stop_gradient(m))))
    sums = (classes.reduce(jnp.sum, a) for a in (mul0(e, t), jnp.where(is_label, t, zero)))
    return (m, s, x_y), (jnp.zeros_like(m), *sums)


def surprisal_at_label(d: Array, s: Array) -> Array:
    """log 1/q_y = d + log(e^-d + s), of d ≥ 0 and s of `off_label_sum`."""
    # With d = 1 at most taken into s, it is log(1 + s e^d) for a label near the maximum: the sum over the other classes
    # relative to the label's, of which no rounding of x or m is more than a relative error.
    rest = jnp.maximum(d - 1, 0)
    return rest + log1p(s * exp(jnp.minimum(d, 1)) - (1 - exp(-rest)))


def _distance(y, x, classes):
    """2|i - y|, exactly: 0 at the label, and elsewhere above every eᵢ ≤ 1."""
    exact = classes.count(x) <= 2 ** jnp.finfo(x.dtype).nmant
    # Behind the barrier the class index is an array in memory; without, an iota in the sum.
    index = lax.optimization_barrier(2 * jnp.arange(classes.count_here(x), dtype=x.dtype if exact else y.dtype))
    index = classes.fold(jnp.expand_dims(index, range(1, -classes.axis)))
    index = jnp.expand_dims(index, range(x.ndim - index.ndim))
    return jnp.abs(index - classes.column(2 * y).astype(index.dtype)).astype(x.dtype)


# softmax and its logarithm, as functions of x to be differentiated


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def softmax(x: Array, classes: Classes) -> Array:
    """qᵢ = eᵢ/Z."""
    return _exponential(x, 4, classes) / classes.column(_normalizer(x, classes))


@softmax.defjvp
def _softmax_rule(classes, primals, tangents):
    return softmax(*primals, classes), softmax_tangent(tangents[0], primals[0], classes)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
def softmax_tangent(t: Array, x: Array, classes: Classes, scale: Array | None = None) -> Array:
    """dqᵢ along t, or that times a number a row."""
    z, u, *_ = deviation(t, x, classes)
    r = ratio(jnp.ones_like(z) if scale is None else scale, z)
    q = _exponential(x, 4, classes) * classes.column(r)
    return unless_nan(z, mul0(q, u), t, classes)


def centered(t: Array, x: Array, classes: Classes) -> Array:
    """tᵢ - Σⱼ qⱼtⱼ, linear in t."""
    z, u, *_ = deviation(t, x, classes)
    return unless_nan(z, u, t, classes)


class Deviation(NamedTuple):
    """Z, tᵢ - Σⱼ qⱼtⱼ, Σⱼ qⱼtⱼ, and Σᵢ aᵢqᵢ (tᵢ - Σⱼ qⱼtⱼ) as a function of any a with Σᵢ aᵢqᵢ = 0."""

    z: Array
    each: Array
    mean: Array
    covariance: Callable[[Array], Array]


def deviation(t: Array, x: Array, classes: Classes) -> Deviation:
    """How t deviates from its mean under q.

    Where a class dominates, t counts from its own: the deviation there is minus the sum of the small rest, with all its
    digits.
    """
    # A factor a row is cheap on a CPU where it meets an argument, if classes are few, and otherwise their sum.
    few = classes.are_few(x)

    def early(r, a):
        return multiply(jnp.broadcast_to(classes.column(r), a.shape), a) if few else a

    def late(r, total):
        return total if few else multiply(r, total)

    z = _normalizer(x, classes)
    shared = jnp.minimum(jnp.floor(z - 0.5), 1)

    # t is taken from a number a row, any: the dominating class's, or a mean with weights of 12 bits. So next to nothing
    # is left of what Σ q is off 1, where two passes round x otherwise.
    weight = jnp.floor(classes.column(1.25 + FINE * shared) * _exponential(x, 2, classes))
    scale = 1 / jnp.maximum(1, FINE * shared * lax.stop_gradient(z))
    center = late(scale, classes.sum(multiply(weight, early(scale, t))))

    # 0 at a class that dominates, with eᵢ = 1 or qᵢ > 2/3, and eᵢ or qᵢ at any other
    over_z = ratio(jnp.ones_like(z), z)
    e = early(over_z, _exponential(x, 3, classes))
    others = jnp.minimum(jnp.floor(classes.column(1.6 + 2 * shared) - e), e)

    def sum_of_others(a):
        return late(over_z, classes.sum(multiply(a, t - classes.column(center))))

    mean_from_center = sum_of_others(others)
    # Behind the barrier it is the last pass's own; elementwise, that pass may select.
    from_center = t - classes.column(lax.optimization_barrier(center))
    above = 1e30 * jnp.maximum(lax.stop_gradient(z) - 1.5, 0)
    dominant = lax.stop_gradient(x) > classes.column(classes.max(lax.stop_gradient(x)) - 0.3 + above)
    mean = classes.column(mean_from_center)
    each = jnp.where(dominant, -mean, from_center - mean)
    return Deviation(z, each, center + mean_from_center, lambda a: sum_of_others(multiply(others, a)))


def unless_nan(z, tangent, t, classes):
    """A row of NaN is NaN along t, but 0 where t = 0, which its sums can't say."""
    zero = lax.stop_gradient(classes.column(z - z))  # or NaN; a constant NaN would be one for jax_debug_nans
    nan = mul0(jnp.broadcast_to(zero, t.shape), t)
    return jnp.where(classes.column(jnp.isfinite(z)), tangent, nan)


def _normalizer(x, classes):
    """Z = Σ eᵢ ≥ 1."""
    return classes.sum(_exponential(x, 0, classes))


@functools.partial(custom_jvp, nondiff_argnums=(1, 2))
def _exponential(x, k, classes):
    """eᵢ = exp(xᵢ - m), for a constant m, in the pass number k over x, of which each says m in another way."""
    m = maximum(x, classes)
    if k:
        m = another(m, k * classes.sum(exp(x - classes.column(m))), classes.are_few(x))
    return exp(x - classes.column(m))


# deᵢ = eᵢtᵢ
@_exponential.defjvp
def _exponential_rule(k, classes, primals, tangents):
    e = _exponential(*primals, k, classes)
    return e, mul0(e, tangents[0])


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def complement(x: Array, classes: Classes) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    n = normalizer(x, classes)
    return (classes.column(n.s) + (1 - exp(n.depth(x, classes)))) / classes.column(n.z)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, classes), -softmax_tangent(t, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def surprisal(x: Array, classes: Classes) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    return normalizer(x, classes).surprisal(x, classes)


# d log 1/qᵢ = -(tᵢ - Σⱼ qⱼtⱼ)
@surprisal.defjvp
def _surprisal_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return surprisal(x, classes), -centered(t, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def logsumexp(x: Array, classes: Classes) -> Array:
    """log Σ exp xᵢ = m + log(1 + s)."""
    n = normalizer(x, classes)
    return n.m + n.log_z


# d log Σ exp xᵢ = Σ qᵢtᵢ
@logsumexp.defjvp
def _logsumexp_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    z, _, mean, _ = deviation(t, x, classes)
    # Not Σ qᵢtᵢ, for Σ qᵢ is 1 here to the last digit, whatever two passes make of x.
    nan = classes.sum(mul0(jnp.broadcast_to(classes.column(lax.stop_gradient(z - z)), t.shape), t))
    return logsumexp(x, classes), jnp.where(jnp.isfinite(z), mean, nan)
