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
library is slow at two more things: an argument that meets a result, and a constant that doesn't meet an argument. At a
long formula the library is slow too: that had better end in a select, so that one loop stores it for the sum.

An accelerator only waits for memory. One reduction for m, s and the entropy's sum reads a row once (`Way.REDUCTION`).
For a GPU, XLA makes one kernel of a chain of sums over short rows, and of the array made of them, if x is nowhere taken
but in x - m, nothing has two results, and no barrier is inside (`Way.CHAIN`).
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
from jce._platforms import Way, at_label, per_platform, per_platform_apart

FINE = 2.0**12  # how finely a weight is rounded that only centers a tangent
FAR = 1e4  # how far below the maximum exp is 0, in float64 too


def maximum(x: Array, classes: Classes) -> Array:
    """m = max x, and NaN where it is +∞."""
    if classes.way is Way.REDUCTION:
        return sums_in_one_pass(x, classes).m
    m = classes.max(x)
    return m if classes.way is Way.CHAIN else jnp.where(m == jnp.inf, m - m, m)  # in a chain x - m is NaN there


def another(m: Array, s: Array, few: bool = False) -> Array:
    """The number m again, to be broadcast for another pass over the logits; s ≥ 0 is a result of the pass before.

    What two passes share, N × n numbers, XLA stores on a CPU unless it fuses both. So m is said as max(m, m - s), which
    XLA can't see through, and the pass computes its own. Sums over few classes are better off shared.
    """
    return m if few else jnp.maximum(m, m - s)


class Sums(NamedTuple):
    """Of some classes m = max x and, over all but one that has it, s = Σ eᵢ and t = Σ eᵢ (m - xᵢ)."""

    m: Array
    s: Array
    t: Array


def sums_in_one_pass(x: Array, classes: Classes) -> Sums:
    """Of each row, read once: in one reduction, or of a short one by a GPU's one kernel. NaN where m is no number."""
    if classes.way is Way.CHAIN:
        return _sums_in_a_chain(x, classes)
    m, s, t = _sums_here(x, classes)
    if classes.mesh_axis is not None:
        here, m = m, lax.pmax(lax.stop_gradient(m), classes.mesh_axis)
        depth = jnp.minimum(jnp.maximum(m, jnp.finfo(m.dtype).min) - lax.stop_gradient(here), FAR)
        e, z = exp(-depth), 1 + s
        t, s, z = map(classes.over_devices, (e * (t + depth * z), e * jnp.where(depth < 0.5, s, z), e * z))
        s = jnp.maximum(s, _off_maximum(z))
    return Sums(m, s + (m - m), t)


def _sums_in_a_chain(x, classes):
    m = maximum(x, classes)
    d = x - classes.column(m)
    e = exp(d)
    s = classes.sum(jnp.where(e > 0.75, jnp.zeros_like(e), e))
    n = Normalizer(m, jnp.maximum(s, _off_maximum(classes.sum(e))))
    return Sums(*n, -classes.sum(e * jnp.maximum(n.depth(x, classes), -FAR)))


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sums_here(x, classes):
    """The same of this device's classes.

    Of two sets of classes the one with the lower maximum is scaled to the other's, and its own maximal class joins the
    others: all terms are positive, and of one reading of x, so that nothing cancels.
    """

    def merged(a, b):
        a_is_first = a[0] >= b[0]
        m, (s, t) = jnp.maximum(a[0], b[0]), (jnp.where(a_is_first, *pair) for pair in zip(a[1:], b[1:], strict=True))
        m_b, s_b, t_b = (jnp.where(a_is_first, *pair) for pair in zip(b, a, strict=True))
        depth = jnp.where(m_b == -jnp.inf, FAR, jnp.minimum(m - m_b, FAR))
        e, z_b = exp(-depth), 1 + s_b
        return m, s + e * z_b, t + e * (t_b + depth * z_b)

    first = tuple(jnp.asarray(number, x.dtype) for number in (-jnp.inf, 0, 0))
    sums = lax.reduce((x, jnp.zeros_like(x), jnp.zeros_like(x)), first, merged, (x.ndim + classes.axis,))
    # Where XLA sees that one isn't asked for, it leaves it out, and then computes the others anew for who asks for all.
    return tuple(lax.optimization_barrier(tuple(sums)))


# For a constant m, ds = Σ eᵢdxᵢ and dt = Σ eᵢ (m - xᵢ - 1) dxᵢ, over all classes.
@_sums_here.defjvp
def _sums_here_rule(classes, primals, tangents):
    (x,), (dx,) = primals, tangents
    m, s, t = _sums_here(x, classes)
    finite = lax.stop_gradient(jnp.maximum(m, jnp.finfo(m.dtype).min))
    depth = jnp.minimum(classes.column(finite) - x, FAR)
    slopes = exp(-depth), exp(-depth) * (depth - 1)
    return (m, s, t), (jnp.zeros_like(m), *(classes.reduce(jnp.sum, mul0(slope, dx)) for slope in slopes))


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
        if classes.way is Way.CHAIN:
            return self.depth_and_dominant(x, self.m, classes)[0]
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
    if classes.masks:
        return Normalizer(*sums_in_one_pass(x, classes)[:2])
    m = maximum(x, classes)
    z = classes.sum(exp(x - classes.column(m)))
    e = exp(x - classes.column(another(m, z, classes.are_few(x))))
    most = jnp.maximum(1.75, -z)  # 7/4: a number a row, since a constant would be shared with another array's sum
    s = classes.sum(e * jnp.floor(classes.column(most) - e))
    s = jnp.maximum(s, _off_maximum(z))
    return Normalizer(m, s if classes.mesh_axis is None else with_derivative_of(s, z))


def _off_maximum(z):
    """Z - 1, which s is where Z ≥ 3/2, and less than s otherwise. Between 1.4 and 1.53 they are the same."""
    return jnp.minimum(z - 1, 4 * z - 5.6)


def with_derivative_of(a: Array, b: Array) -> Array:
    """a, with b's derivative: of where m is a constant, as it is over devices, a sum without the maximal class has not
    all of its own. Rules don't need it, but JAX before 0.12 forgets them in the head's loop."""
    return lax.stop_gradient(a) + (b - lax.stop_gradient(b))


def off_label_sum(labels: Array, x: Array, classes: Classes) -> tuple[Array, Array, Array]:
    """m, s = Σ exp(xᵢ - m) over all classes but the label, and d = m - x at the label; NaN for a label out of range."""
    y, n = classes.local(labels, x), classes.count(x)
    is_class = (labels >= 0) & (labels < n)
    if classes.way is Way.REDUCTION:
        m, s, _ = sums_in_one_pass(x, classes)
        m = jnp.where(is_class, m, jnp.full_like(m, jnp.nan))
        d = m - at_label(x, y, classes)
        # Where s < 1/2, only the maximal class has d < log 2.
        d = jnp.where(jnp.maximum(s, d) < 0.5, d - lax.stop_gradient(d), d)
        return m, s + (1 - exp(-d)), d
    m = maximum(x, classes)
    if classes.way is Way.CHAIN:  # where all is made of x - m
        is_label, d = classes.is_at(x, y), x - classes.column(m)
        s = classes.sum(jnp.where(is_label, jnp.zeros_like(d), exp(d)))
        d = -classes.sum(jnp.where(is_label, d, jnp.zeros_like(d)))
        return m, s, jnp.where(is_class, d, jnp.full_like(d, jnp.nan))
    s = classes.sum(jnp.minimum(exp(x - classes.column(m)), _distance(y, x, classes)))
    m = jnp.where(is_class, m, jnp.full_like(m, jnp.nan))
    return m, s, m - classes.at(x, y)


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
@per_platform_apart
def softmax(x: Array, classes: Classes) -> Array:
    """qᵢ = eᵢ/Z."""
    if classes.masks:
        n = normalizer(x, classes)
        return exp(x - classes.column(n.m)) / classes.column(n.z)
    return _exponential(x, 4, classes) / classes.column(_normalizer(x, classes))


@softmax.defjvp
def _softmax_rule(classes, primals, tangents):
    return softmax(*primals, classes), softmax_tangent(tangents[0], primals[0], None, classes)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@per_platform_apart
def softmax_tangent(t: Array, x: Array, scale: Array | None, classes: Classes) -> Array:
    """dqᵢ along t, or that times a number a row."""
    z, u, *_ = deviation(t, x, classes)
    r = ratio(jnp.ones_like(z) if scale is None else scale, z)
    q = _exponential(x, 4, classes) * classes.column(r)
    return unless_nan(z, mul0(q, u), t, classes)


@per_platform_apart
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
    if classes.masks:
        return _deviation_by_masks(t, x, classes)

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


def _deviation_by_masks(t, x, classes):
    """The same, in sums of one pass over t and x."""
    still = lax.stop_gradient(x)
    n = normalizer(still, classes)
    dominant = n.depth_and_dominant(still, n.m, classes)[1]
    e, zero = _exponential(x, 0, classes), jnp.zeros_like(t)
    others, center = jnp.where(dominant, zero, e), classes.sum(jnp.where(dominant, t, zero))
    z = classes.sum(e)
    over_z = ratio(jnp.ones_like(z), z)

    def sum_of_others(weights):
        return multiply(over_z, classes.sum(multiply(weights, t)) - multiply(classes.sum(weights), center))

    from_center = sum_of_others(others)

    column = classes.column(from_center)
    each = jnp.where(dominant, -column, (t - classes.column(center)) - column)
    return Deviation(z, each, center + from_center, lambda a: sum_of_others(multiply(others, a)))


def unless_nan(z, tangent, t, classes):
    """A row of NaN is NaN along t, but 0 where t = 0, which its sums can't say."""
    zero = lax.stop_gradient(classes.column(z - z))  # or NaN; a constant NaN would be one for jax_debug_nans
    nan = mul0(jnp.broadcast_to(zero, t.shape), t)
    number = z <= jnp.finfo(z.dtype).max  # z ≥ 1; isfinite would end a GPU's chain
    return jnp.where(classes.column(number), tangent, nan)


def _normalizer(x, classes):
    """Z = Σ eᵢ ≥ 1."""
    return classes.sum(_exponential(x, 0, classes))


@functools.partial(custom_jvp, nondiff_argnums=(1, 2))
def _exponential(x, k, classes):
    """eᵢ = exp(xᵢ - m), for a constant m, in the pass number k over x, of which each says m in another way."""
    m = maximum(x, classes)
    if k and not classes.masks:
        m = another(m, k * classes.sum(exp(x - classes.column(m))), classes.are_few(x))
    return exp(x - classes.column(m))


# deᵢ = eᵢtᵢ
@_exponential.defjvp
def _exponential_rule(k, classes, primals, tangents):
    e = _exponential(*primals, k, classes)
    return e, mul0(e, tangents[0])


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@per_platform_apart
def complement(x: Array, classes: Classes) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    n = normalizer(x, classes)
    return (classes.column(n.s) + (1 - exp(n.depth(x, classes)))) / classes.column(n.z)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, classes), -softmax_tangent(t, x, None, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@per_platform_apart
def surprisal(x: Array, classes: Classes) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    return normalizer(x, classes).surprisal(x, classes)


# d log 1/qᵢ = -(tᵢ - Σⱼ qⱼtⱼ)
@surprisal.defjvp
def _surprisal_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return surprisal(x, classes), -centered(t, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@per_platform
def logsumexp(x: Array, classes: Classes) -> Array:
    """log Σ exp xᵢ = m + log(1 + s)."""
    n = normalizer(x, classes)
    return n.m + n.log_z


# d log Σ exp xᵢ = Σ qᵢtᵢ
@logsumexp.defjvp
def _logsumexp_rule(classes, primals, tangents):
    return logsumexp(*primals, classes), _mean(*tangents, *primals, classes)


@per_platform
def _mean(t, x, classes):
    z, _, mean, _ = deviation(t, x, classes)
    # Not Σ qᵢtᵢ, for Σ qᵢ is 1 here to the last digit, whatever two passes make of x.
    nan = classes.sum(mul0(jnp.broadcast_to(classes.column(lax.stop_gradient(z - z)), t.shape), t))
    return jnp.where(jnp.isfinite(z), mean, nan)
