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

How the sums are written is a machine's matter (`_ways`): a kernel gets the classes as they are summed where it runs.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from jce._calculus import custom_jvp, ratio
from jce._elementary import exp, log1p
from jce._mul0 import mul0
from jce._ways.kernel import kernel, kernel_apart
from jce._ways.way import OffLabel, Way


def surprisal_at_label(off: OffLabel) -> Array:
    """log 1/q_y = log(1 + s e^d) = d + log(e^-d + s)."""
    _, s, d = off
    # With d = 1 at most taken into s, for a label near the maximum: the sum over the other classes relative to the
    # label's, of which no rounding of x or m is more than a relative error. Where s < 1/2, m isn't the maximum of the
    # others; then e^-d + s may be as small as it is, and d is below 16 (`_ways/known_label.py`).
    near = jnp.where(s < 0.5, d, jnp.minimum(d, 1))
    rest = d - near
    return rest + log1p(s * exp(near) - (1 - exp(-rest)))


# softmax and its logarithm, as functions of x to be differentiated


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel_apart
def softmax(x: Array, classes: Way) -> Array:
    """qᵢ = eᵢ/Z."""
    e, z, _ = classes.exponentials(x)
    return e / classes.column(z)


@softmax.defjvp
def _softmax_rule(classes, primals, tangents):
    return softmax(*primals, classes), softmax_tangent(tangents[0], primals[0], None, classes)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@kernel_apart
def softmax_tangent(t: Array, x: Array, scale: Array | None, classes: Way) -> Array:
    """dqᵢ along t, or that times a number a row."""
    e, z, u, *_ = classes.deviation(t, x)
    q = e * classes.column(ratio(jnp.ones_like(z) if scale is None else scale, z))
    return unless_nan(z, mul0(q, u), t, classes)


@kernel_apart
def centered(t: Array, x: Array, classes: Way) -> Array:
    """tᵢ - Σⱼ qⱼtⱼ, linear in t."""
    _, z, u, *_ = classes.deviation(t, x)
    return unless_nan(z, u, t, classes)


def unless_nan(z, tangent, t, classes):
    """A row of NaN is NaN along t, but 0 where t = 0, which its sums can't say."""
    zero = lax.stop_gradient(classes.column(z - z))  # or NaN; a constant NaN would be one for jax_debug_nans
    nan = mul0(jnp.broadcast_to(zero, t.shape), t)
    number = z <= jnp.finfo(z.dtype).max  # z ≥ 1; not isfinite (`_ways/chain.py`)
    return jnp.where(classes.column(number), tangent, nan)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel_apart
def complement(x: Array, classes: Way) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    n = classes.exponentials(x).of_row
    return (classes.column(n.s) + (1 - exp(classes.depth(x, n)))) / classes.column(n.z)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, classes), -softmax_tangent(t, x, None, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel_apart
def surprisal(x: Array, classes: Way) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    return classes.exponentials(x).of_row.surprisal(x, classes)


# d log 1/qᵢ = -(tᵢ - Σⱼ qⱼtⱼ)
@surprisal.defjvp
def _surprisal_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return surprisal(x, classes), -centered(t, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def logsumexp(x: Array, classes: Way) -> Array:
    """log Σ exp xᵢ = m + log(1 + s)."""
    n = classes.for_log_sum(x).normalizer(x)
    return n.m + n.log_z


# d log Σ exp xᵢ = Σ qᵢtᵢ
@logsumexp.defjvp
def _logsumexp_rule(classes, primals, tangents):
    return logsumexp(*primals, classes), _mean(*tangents, *primals, classes)


@kernel
def _mean(t, x, classes):
    _, z, _, mean, _ = classes.deviation(t, x)
    # Not Σ qᵢtᵢ, for Σ qᵢ is 1 here to the last digit, whatever two passes make of x.
    nan = classes.sum(mul0(jnp.broadcast_to(classes.column(lax.stop_gradient(z - z)), t.shape), t))
    return jnp.where(jnp.isfinite(z), mean, nan)
