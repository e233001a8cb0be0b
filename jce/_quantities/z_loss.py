"""ζ (log Σ exp x)², the z-loss of logits x. Added to a cross-entropy, it fixes the offset that softmax(x) ignores."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jce._jax.restricted import live_jvp
from jce._numerics.calculus import custom_jvp, sum_of_tangents
from jce._numerics.elementary import exp, log
from jce._numerics.mul0 import mul0
from jce._quantities.label_surprisal import label_surprisal_and_excess
from jce._quantities.soft_targets import scaled, scaled_square
from jce._softmax.kernel import kernel, kernel_sharing
from jce._softmax.softmax import logsumexp, softmax, surprisal_at_label


@functools.partial(custom_jvp, nondiff_argnums=(2,))
def log_sum_penalty(x, z_loss, classes):
    """ζ (log Σ exp xᵢ)²"""
    return _penalty_and_slope(x, z_loss, classes)[0]


# ∂/∂xᵢ ζ (log Σ exp x)² = 2ζqᵢ log Σ exp x, ∂/∂ζ = (log Σ exp x)²
def _penalty_rule(classes, primals, tangents):
    penalty, slope = _penalty_and_slope(*primals, classes)
    return penalty, sum_of_tangents(
        tangents,
        lambda dx: classes.sum(mul0(slope, dx)),
        lambda t: scaled_square(t, logsumexp(primals[0], classes)),
    )


log_sum_penalty.defjvp(_penalty_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel_sharing
def _penalty_and_slope(x, z_loss, way):
    way = way.for_log_sum(x)
    e, z, n = way.exponentials(x)
    log_sum = n.m + n.log_z
    return scaled_square(z_loss, log_sum), e * way.column(scaled(2 * z_loss, log_sum) / z)


def _penalty_and_slope_rule(classes, primals, tangents):
    def separately(x, z_loss):
        slope = scaled(2 * z_loss, logsumexp(x, classes))
        return log_sum_penalty(x, z_loss, classes), mul0(softmax(x, classes), classes.broadcast(slope, x))

    return _penalty_and_slope(*primals, classes), live_jvp(separately, primals, tangents)[1]


_penalty_and_slope.defjvp(_penalty_and_slope_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def penalized_label_surprisal(y, x, z_loss, way):
    """log 1/q_y + ζ (log Σ exp x)²"""
    return _penalized(way.for_log_sum(x).off_label_of_any_shift(y, x), z_loss)[0]


def _penalized(off, z_loss):
    """The loss, and log Σ exp x."""
    surprisal = surprisal_at_label(off)
    log_sum = off.m + log_z_off_label(off, surprisal)
    return surprisal + scaled_square(z_loss, log_sum), log_sum


def log_z_off_label(off, surprisal):
    """log Z; where the label outweighs the others, as log 1/q_y - d, since s + e^-d may have rounded s away."""
    _, s, d = off
    return jnp.where(s < exp(-d), surprisal - d, log(off.z))


# ∂/∂xᵢ = qᵢ - [i = y] + 2ζqᵢ log Σ exp x, ∂/∂ζ = (log Σ exp x)²
def _penalized_rule(classes, primals, tangents):
    loss, excess = _penalized_and_excess(*primals, classes)
    return loss, sum_of_tangents(
        tangents[1:],
        lambda dx: classes.sum(mul0(excess, dx)),
        lambda t: scaled_square(t, logsumexp(primals[1], classes)),
    )


penalized_label_surprisal.defjvp(_penalized_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel_sharing
def _penalized_and_excess(y, x, z_loss, way):
    way = way.for_log_sum(x)
    off, e = way.exponentials_off_label(y, x)
    loss, log_sum = _penalized(off, z_loss)
    pull = 2 * z_loss * log_sum
    # At the label q_y - 1 + q_y pull = (e_y pull - s)/Z, without the cancellation in q_y - 1.
    at_label, others = map(way.column, (pull * exp(-off.d) - off.s, 1 + pull))
    excess = jnp.where(way.is_at(x, way.local(y, x)), at_label, e * others) / way.column(off.z)
    return loss, excess


def _penalized_and_excess_rule(classes, primals, tangents):
    def separately(y, x, z_loss):
        loss, excess = label_surprisal_and_excess(y, x, classes)
        penalty, slope = _penalty_and_slope(x, z_loss, classes)
        return loss + penalty, excess + slope

    return _penalized_and_excess(*primals, classes), live_jvp(separately, primals, tangents)[1]


_penalized_and_excess.defjvp(_penalized_and_excess_rule, symbolic_zeros=True)
