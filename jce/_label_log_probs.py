"""log q at some labels of each row, from one pass over the classes, and of all other classes together, as exactly.

Of k labels log q_j = -(log(1 + s) + m - x_j), with m = max x and the off-maximum sum s, once for them all, and k
numbers of x that are looked up. Where a class dominates, its m - x_j is 0 by definition.

With a tail there are k + 1 outcomes: the labels, and the classes without one, of which m and Z = Σ exp(xᵢ - m) are all
that is needed. Nothing cancels there, whichever takes nearly everything: log q of an outcome of more than .55 is
log 1/(1 + r), r the others' weights over its own, and that of any other a difference of more than .5 from log Σ w.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._calculus import custom_jvp
from jce._classes import Classes
from jce._elementary import exp, log, log1p
from jce._mul0 import mul0
from jce._softmax import centered, softmax
from jce._waiting import Program, waiting
from jce._ways.kernel import kernel
from jce._ways.over_classes import without_classes
from jce._ways.way import Normalizer


def log_probs_of(y: Array, x: Array, classes: Classes) -> Array:
    """log q at labels [..., k], of logits [..., n]; NaN for one that is no class."""
    m, s = _sums(lax.stop_gradient(x), classes)
    return _log_probs(y, x, m, s, classes) + _zero(s, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(4,))
def _log_probs(y, x, m, s, classes):
    n = Normalizer(m[..., None], s[..., None])
    d = n.m - at_labels(x, y, classes)
    d = jnp.where(d < 0.5 - n.shared, jnp.zeros_like(d), d)
    return jnp.where(is_class(y, x, classes), 0 - (n.log_z + d), jnp.full_like(d, jnp.nan))


# d log q_j = t_j - Σᵢ qᵢtᵢ
@_log_probs.defjvp
def _log_probs_rule(classes, primals, tangents):
    y, x, *_ = primals
    each = at_labels(centered(tangents[1], x, classes), y, classes)
    return _log_probs(*primals, classes), _unless_no_class(y, x, each, classes)


@kernel
def _sums(x, classes):
    return tuple(classes.normalizer(x))


def log_probs_and_tail(y: Array, x: Array, classes: Classes) -> Array:
    """The same, and log(1 - Σq) of all classes without a label behind: of k + 1 outcomes."""
    listed = jnp.where(is_class(y, x, classes), at_labels(x, y, classes), -jnp.inf)
    m, z, log_z = _sum_of_exponentials(without_classes(y, x, classes), classes)
    m = lax.stop_gradient(m)
    most = jnp.maximum(m, lax.stop_gradient(listed).max(-1, initial=-jnp.inf))
    depth = listed - most[..., None]
    logs = jnp.concatenate([depth, (m - most + log_z)[..., None]], -1)
    # Each of a single difference, whose rounding is all that is lost; that of logs would be another.
    weights = jnp.concatenate([exp(depth), (exp(m - most) * z)[..., None]], -1)
    weights = lax.stop_gradient(weights)
    log_probs = _log_shares(logs, weights) + _zero(log(weights.sum(-1)), x, classes)
    return jnp.concatenate([_unless_no_class(y, x, log_probs[..., :-1], classes), log_probs[..., -1:]], -1)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sum_of_exponentials(x, classes):
    """m = max x, Z = Σ exp(xᵢ - m), and its logarithm: 0 and -∞ where all is impossible."""
    m, z = _max_and_sum(x, classes)
    return m, z, log(z)


@kernel
def _max_and_sum(x, classes):
    return classes.max_and_sum(x)


# d log Z = Σᵢ rᵢtᵢ, r = softmax(x), for a constant m; of Z itself no derivative is taken
@_sum_of_exponentials.defjvp
def _sum_of_exponentials_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    m, z, log_z = _sum_of_exponentials(x, classes)
    # Where nothing is possible, any softmax does, of which nothing is taken.
    nothing, zero = m == -jnp.inf, jnp.zeros_like(m)
    floor = lax.stop_gradient(jnp.where(nothing, zero, jnp.full_like(m, -jnp.inf)))
    mean = classes.sum(mul0(softmax(jnp.maximum(x, classes.column(floor)), classes), t))
    return (m, z, log_z), (zero, zero, jnp.where(nothing, zero, mean))


# Outcomes of weights wᵢ ≥ 0, with their logarithms, in which they are differentiated: qᵢ = wᵢ / Σ w


@custom_jvp
def _log_shares(logs, w):
    """log qᵢ."""
    total = w.sum(-1, keepdims=True)
    most = _has(0.55, w)
    near = 0 - log1p(_sum_of_others(w, w) / jnp.where(most, w, jnp.ones_like(w)))
    return jnp.where(most, near, logs - log(total))


# d log qᵢ = tᵢ - Σⱼ qⱼtⱼ
@_log_shares.defjvp
def _log_shares_rule(primals, tangents):
    return _log_shares(*primals), _from_mean(tangents[0], *primals)


@custom_jvp
def _shares(logs, w):
    return w / w.sum(-1, keepdims=True)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@_shares.defjvp
def _shares_rule(primals, tangents):
    return _shares(*primals), mul0(_shares(*primals), _from_mean(tangents[0], *primals))


def _from_mean(t, logs, w):
    """tᵢ - Σⱼ qⱼtⱼ, linear in t, which counts from that of the outcome of more than a half, if there is one."""
    center = jnp.where(_has(0.5, w), t, jnp.zeros_like(t)).sum(-1, keepdims=True)
    mean = _sum_of_others(w, mul0(_shares(logs, w), t - center))
    return jnp.where(_has(0.55, w), -mean, t - center - mean)


def _sum_of_others(w, a):
    """Σ aᵢ but of the outcome of more than a half."""
    return jnp.where(_has(0.5, w), jnp.zeros_like(a), a).sum(-1, keepdims=True)


def _has(share, w):
    """Which outcome has more of the sum: what is selected by .55 is left out by .5 too, whatever rounding each sees."""
    return w > share * w.sum(-1, keepdims=True)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def _zero(z, x, classes):
    """0 in a column, and NaN of a row that is no distribution, as z says: in all derivatives, not the labels' alone."""
    return (z - z)[..., None]


@_zero.defjvp
def _zero_rule(classes, primals, tangents):
    z, x, t = *primals, tangents[1]
    return _zero(z, x, classes), classes.sum(mul0(classes.each(z - z, t), t))[..., None]


# Labels of a row: where they are, and where they are not


def is_class(y, x, classes):
    return (y >= 0) & (y < classes.count(x))


def _unless_no_class(y, x, r, classes):
    """A number a label, and NaN times it where the label is no class."""
    return mul0(jnp.where(is_class(y, x, classes), jnp.ones_like(r), jnp.full_like(r, jnp.nan)), r)


def at_labels(x, y, classes):
    """x [..., n] at labels [..., k] of all devices' classes; where one is none, at any."""
    y = classes.local(y, x)
    there = waiting(Program(_at_labels, (Classes(classes.axis),)), x, y)
    if classes.mesh_axis is None:
        return there
    return classes.over_devices(jnp.where(classes.has(x, y), there, jnp.zeros_like(there)))


def _at_labels(classes, _, x, y):
    return jax.vmap(classes.at, (None, -1), -1)(x, y)
