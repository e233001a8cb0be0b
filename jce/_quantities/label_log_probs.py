"""log q at k labels per row, from one pass over the classes, and for all classes without a label together.

For label j, log q_j = -(log(1 + s) + m - x_j). Here m = max x and the off-maximum sum s (`softmax.py`) are computed
once for all labels, and x_j is looked up. If a class dominates, its m - x_j is set to 0.

With a tail there are k + 1 outcomes: the labels, and all classes without a label together, which have their own m and
Z = Σ exp(xᵢ - m). The weight w of an outcome is its probability q, up to a factor that all outcomes share. Nothing
cancels, even if one outcome has nearly all of the probability. An outcome with q > .55 has log q = -log(1 + r), where r
is the sum of the others' weights divided by its own weight. Any other outcome has log q = log w - log Σ w < log .55 =
-.6.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._jax.classes import Classes
from jce._jax.waiting import Program, waiting
from jce._numerics.calculus import custom_jvp
from jce._numerics.elementary import exp, log, log1p
from jce._numerics.mul0 import mul0
from jce._softmax.kernel import kernel
from jce._softmax.over_classes import without_classes
from jce._softmax.softmax import centered, softmax
from jce._softmax.sums import Normalizer


def log_probs_of(y: Array, x: Array, classes: Classes) -> Array:
    """log q for logits [..., n] at labels [..., k]; NaN at a label out of range."""
    m, s = _sums(lax.stop_gradient(x), classes)
    return _log_probs(y, x, m, s, classes) + _zero(s, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(4,))
def _log_probs(y, x, m, s, classes):
    n = Normalizer(m[..., None], s[..., None])
    d = n.m - at_labels(x, y, classes)
    # The class that dominates (`softmax.py`) has d < 0.5, and all others have d > 0.5. If none dominates, no d is below
    # -0.5.
    d = jnp.where(d < 0.5 - n.undominated, jnp.zeros_like(d), d)
    return jnp.where(is_class(y, x, classes), 0 - (n.log_z + d), jnp.full_like(d, jnp.nan))


# d log q_j = t_j - Σᵢ qᵢtᵢ
@_log_probs.defjvp
def _log_probs_rule(classes, primals, tangents):
    y, x, *_ = primals
    at_each = at_labels(centered(tangents[1], x, classes), y, classes)
    return _log_probs(*primals, classes), _unless_no_class(y, x, at_each, classes)


@kernel
def _sums(x, backend):
    return tuple(backend.normalizer(x))


def log_probs_and_tail(y: Array, x: Array, classes: Classes) -> Array:
    """log q at the labels and, as the last entry, log(1 - Σq) for all classes without a label: [..., k + 1]."""
    listed = jnp.where(is_class(y, x, classes), at_labels(x, y, classes), -jnp.inf)
    m, z, log_z = _sum_of_exponentials(without_classes(y, x, classes), classes)
    m = lax.stop_gradient(m)
    most = jnp.maximum(m, lax.stop_gradient(listed).max(-1, initial=-jnp.inf))
    depth = listed - most[..., None]
    logs = jnp.concatenate([depth, (m - most + log_z)[..., None]], -1)
    # Each weight is exp of a single difference, and the last one is multiplied by Z. exp(logs) would also have the
    # rounding error of log Z.
    weights = jnp.concatenate([exp(depth), (exp(m - most) * z)[..., None]], -1)
    weights = lax.stop_gradient(weights)
    log_probs = _log_normalized(logs, weights) + _zero(log(weights.sum(-1)), x, classes)
    return jnp.concatenate([_unless_no_class(y, x, log_probs[..., :-1], classes), log_probs[..., -1:]], -1)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
def _sum_of_exponentials(x, classes):
    """m = max x, Z = Σ exp(xᵢ - m) and log Z. If all logits are -∞, Z = 0 and log Z = -∞."""
    m, z = _max_and_sum(x, classes)
    return m, z, log(z)


@kernel
def _max_and_sum(x, backend):
    return backend.max_and_sum(x)


# d log Z = Σᵢ rᵢtᵢ with r = softmax(x), for a constant m. Nothing differentiates Z itself.
@_sum_of_exponentials.defjvp
def _sum_of_exponentials_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    m, z, log_z = _sum_of_exponentials(x, classes)
    # A row of only -∞ is replaced by zeros, since its softmax would be NaN. The last line sets its derivative to 0.
    nothing, zero = m == -jnp.inf, jnp.zeros_like(m)
    floor = lax.stop_gradient(jnp.where(nothing, zero, jnp.full_like(m, -jnp.inf)))
    mean = classes.sum(mul0(softmax(jnp.maximum(x, classes.column(floor)), classes), t))
    return (m, z, log_z), (zero, zero, jnp.where(nothing, zero, mean))


# Outcomes with weights wᵢ ≥ 0 and qᵢ = wᵢ / Σ w. Derivatives are with respect to `logs`, the logarithms of the weights.


@custom_jvp
def _log_normalized(logs, w):
    """log qᵢ."""
    total = w.sum(-1, keepdims=True)
    most = _exceeds(0.55, w)
    near = 0 - log1p(_sum_of_others(w, w) / jnp.where(most, w, jnp.ones_like(w)))
    return jnp.where(most, near, logs - log(total))


# d log qᵢ = tᵢ - Σⱼ qⱼtⱼ
@_log_normalized.defjvp
def _log_normalized_rule(primals, tangents):
    return _log_normalized(*primals), _from_mean(tangents[0], *primals)


@custom_jvp
def _normalized(logs, w):
    return w / w.sum(-1, keepdims=True)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@_normalized.defjvp
def _normalized_rule(primals, tangents):
    return _normalized(*primals), mul0(_normalized(*primals), _from_mean(tangents[0], *primals))


def _from_mean(t, logs, w):
    """tᵢ - Σⱼ qⱼtⱼ, linear in t. If an outcome has q > 1/2, its t is first subtracted from all t, so that nothing
    cancels in its entry."""
    center = jnp.where(_exceeds(0.5, w), t, jnp.zeros_like(t)).sum(-1, keepdims=True)
    mean = _sum_of_others(w, mul0(_normalized(logs, w), t - center))
    return jnp.where(_exceeds(0.55, w), -mean, t - center - mean)


def _sum_of_others(w, a):
    """Σ aᵢ over all outcomes except one with q > 1/2."""
    return jnp.where(_exceeds(0.5, w), jnp.zeros_like(a), a).sum(-1, keepdims=True)


def _exceeds(fraction, w):
    """Where w > fraction · Σ w. Callers select an outcome with the fraction .55, and leave it out of a sum with .5. So
    a selected outcome is always left out, however the two comparisons round."""
    return w > fraction * w.sum(-1, keepdims=True)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def _zero(z, x, classes):
    """A column of 0, with NaN in rows where z is NaN or ∞. Adding it makes all derivatives of such a row NaN too."""
    return (z - z)[..., None]


@_zero.defjvp
def _zero_rule(classes, primals, tangents):
    t = tangents[1]
    zero = _zero(*primals, classes)  # in the tangent too, so that the next derivative is NaN as well
    return zero, classes.sum(mul0(classes.broadcast(zero[..., 0], t), t))[..., None]


# Looking labels up


def is_class(y, x, classes):
    return (y >= 0) & (y < classes.count(x))


def _unless_no_class(y, x, r, classes):
    """r [..., k]; NaN where the label is out of range, but 0 where r = 0, so that a tangent of 0 stays 0."""
    return mul0(jnp.where(is_class(y, x, classes), jnp.ones_like(r), jnp.full_like(r, jnp.nan)), r)


def at_labels(x, y, classes):
    """x [..., n] at labels [..., k], which index the classes of all devices. At a label out of range, the result is
    arbitrary."""
    y = classes.local(y, x)
    # Until JAX no longer reports an IndexError of its own for such a batch under checkify (0.8 to 0.12): `waiting`
    # hides the lookup from checkify.
    there = waiting(Program(_at_labels, (Classes(classes.axis),)), x, y)
    if classes.mesh_axis is None:
        return there
    return classes.over_devices(jnp.where(classes.has(x, y), there, jnp.zeros_like(there)))


def _at_labels(classes, _, x, y):
    return jax.vmap(classes.at, (None, -1), -1)(x, y)
