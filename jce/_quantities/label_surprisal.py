"""log 1/q_y, a label's cross-entropy at logits, alone or smoothed over all classes.

Its derivative in the logits, q minus the target, is called the excess. One kernel computes value and excess.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jce._numerics.calculus import custom_jvp, sum_of_tangents
from jce._numerics.elementary import exp
from jce._numerics.mul0 import mul0
from jce._quantities.soft_targets import scaled, smoothed, soft, soft_excess, surprisal_terms
from jce._softmax.kernel import kernel
from jce._softmax.softmax import softmax_tangent, surprisal_at_label


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def label_surprisal(y, x, way):
    """log 1/q_y"""
    return surprisal_at_label(way.off_label_of_any_shift(y, x))


# ∂/∂xᵢ log 1/q_y = qᵢ - [i = y]
@label_surprisal.defjvp
def _label_surprisal_rule(classes, primals, tangents):
    surprisal, excess = label_surprisal_and_excess(*primals, classes)
    return surprisal, classes.sum(mul0(excess, tangents[1]))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def label_surprisal_and_excess(y, x, way):
    # One kernel for both: of two kernels XLA couldn't see that they compute the same sums, and would compute them
    # twice.
    off, e = way.exponentials_off_label(y, x)
    return surprisal_at_label(off), _excess_of(y, x, off, e, way)


def _excess_of(y, x, off, e, way):
    return jnp.where(way.is_at(x, way.local(y, x)), way.column(-off.s), e) / way.column(off.z)


@label_surprisal_and_excess.defjvp
def _label_surprisal_and_excess_rule(classes, primals, tangents):
    x, t = primals[1], tangents[1]
    surprisal, excess = label_surprisal_and_excess(*primals, classes)
    return (surprisal, excess), (classes.sum(mul0(excess, t)), softmax_tangent(t, x, None, classes))


@functools.partial(custom_jvp, nondiff_argnums=(4,))
def smoothed_surprisal(y, uniform, x, smoothing, classes):
    """(1-ε) log 1/q_y + ε Σᵢ uᵢ log 1/qᵢ; u is `uniform`: an array, or one number for all, which saves reading one."""
    return _smoothed_surprisal_and_excess(y, uniform, x, smoothing, classes)[0]


# ∂/∂xᵢ = qᵢ - (1-ε) [i = y] - εuᵢ, ∂/∂ε = Σᵢ uᵢ log 1/qᵢ - log 1/q_y
def _smoothed_surprisal_rule(classes, primals, tangents):
    y, uniform, x, _ = primals
    surprisal, excess = _smoothed_surprisal_and_excess(*primals, classes)
    return surprisal, sum_of_tangents(
        tangents[2:],
        lambda dx: classes.sum(mul0(excess, dx)),
        lambda t: scaled(t, mean_excess(y, uniform, x, classes)),
    )


smoothed_surprisal.defjvp(_smoothed_surprisal_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def mean_excess(y, uniform, x, way):
    """Σᵢ uᵢ log 1/qᵢ - log 1/q_y for Σu = 1, computed as Σᵢ uᵢ (m - xᵢ) - (m - x_y): near the uniform distribution both
    losses are about log Z, and their difference would lose all digits."""
    m, s, d = way.off_label(y, x)
    if not uniform.ndim:
        return way.sum(uniform * (way.column(m) - x)) - d
    return way.sum(surprisal_terms(uniform, m + (s - s), x, way)) - d  # s is NaN in a row with a NaN, unlike m


# d = t_y - Σᵢ uᵢtᵢ, and NaN where the row is NaN and t isn't 0
@mean_excess.defjvp
def _mean_excess_rule(classes, primals, tangents):
    (y, uniform, _), (*_, t) = primals, tangents
    excess = mean_excess(*primals, classes)
    nan = classes.broadcast(jnp.where(jnp.isnan(excess), excess, jnp.zeros_like(excess)), t)
    weighted = classes.sum(mul0(nan - uniform, t))
    return excess, classes.at(t, classes.local(y, t)) + weighted


@functools.partial(custom_jvp, nondiff_argnums=(4,))
@kernel
def _smoothed_surprisal_and_excess(y, uniform, x, smoothing, way):
    # `off_label`, not `off_label_of_any_shift`: the mean surprisal needs the maximum, so the label's part shares it.
    u, off = _as_row(uniform, x), way.off_label(y, x)
    surprisal, excess = surprisal_at_label(off), _excess_of(y, x, off, exp(way.depth_off_label(x, off)), way)
    of_uniform = soft(u, x, way) if uniform.ndim else way.sum(uniform * way.normalizer(x).surprisal(x, way))
    return smoothed(surprisal, of_uniform, smoothing), smoothed(excess, soft_excess(u, x, way), smoothing)


# d (qᵢ - (1-ε) [i = y] - εuᵢ) = dqᵢ + ([i = y] - uᵢ) dε
def _smoothed_surprisal_and_excess_rule(classes, primals, tangents):
    y, uniform, x, _ = primals

    def in_smoothing(t):
        return scaled(t, soft_excess(_as_row(uniform, x), x, classes) - label_surprisal_and_excess(y, x, classes)[1])

    d_excess = sum_of_tangents(tangents[2:], lambda dx: softmax_tangent(dx, x, None, classes), in_smoothing)
    d_surprisal = _smoothed_surprisal_rule(classes, primals, tangents)[1]
    return _smoothed_surprisal_and_excess(*primals, classes), (d_surprisal, d_excess)


_smoothed_surprisal_and_excess.defjvp(_smoothed_surprisal_and_excess_rule, symbolic_zeros=True)


def _as_row(uniform, x):
    return uniform + jnp.zeros_like(x)
