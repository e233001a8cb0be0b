"""ζ (log Σ exp x)², the z-loss of logits x. softmax(x) ignores an offset common to all logits. A z-loss, added to a
cross-entropy, determines this offset."""

from __future__ import annotations

import functools

from jce._numerics.calculus import custom_jvp, def_at_once, sum_of_tangents
from jce._numerics.mul0 import mul0
from jce._quantities.soft_targets import scaled, scaled_square
from jce._softmax.kernel import storing_kernel
from jce._softmax.softmax import logsumexp, softmax


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
@storing_kernel
def _penalty_and_slope(x, z_loss, backend):
    backend = backend.for_log_sum(x)
    e, z, n = backend.exponentials(x)
    log_sum = n.m + n.log_z
    return scaled_square(z_loss, log_sum), e * backend.column(scaled(2 * z_loss, log_sum) / z)


def penalty_slope(x, z_loss, classes):
    return mul0(softmax(x, classes), classes.broadcast(scaled(2 * z_loss, logsumexp(x, classes)), x))


def_at_once(_penalty_and_slope, log_sum_penalty, penalty_slope)
