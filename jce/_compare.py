"""Two rows of logits compared: p, q, log q/p and q - p, relatively accurate also where the two are nearly the same."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jce._calculus import custom_jvp
from jce._deviance import difference_from_log
from jce._elementary import exp, log1p, two_sum
from jce._platforms import Way, except_on_tpu, per_platform
from jce._softmax import another, centered, normalizer, softmax_tangent


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform
def q_minus_p(x, y, classes):
    return difference_from_log(*compare(x, y, classes))


# d (qᵢ - pᵢ) = qᵢ (dyᵢ - Σ q dy) - pᵢ (dxᵢ - Σ p dx)
def _q_minus_p_rule(classes, primals, tangents):
    return q_minus_p(*primals, classes), _difference_of_tangents(_softmax_tangent, primals, tangents, classes)


q_minus_p.defjvp(_q_minus_p_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform
def log_q_over_p(x, y, classes):
    return compare(x, y, classes)[2]


# d log qᵢ/pᵢ = (dyᵢ - Σ q dy) - (dxᵢ - Σ p dx)
def _log_q_over_p_rule(classes, primals, tangents):
    return log_q_over_p(*primals, classes), _difference_of_tangents(centered, primals, tangents, classes)


log_q_over_p.defjvp(_log_q_over_p_rule, symbolic_zeros=True)


def _softmax_tangent(t, x, classes):
    return softmax_tangent(t, x, None, classes)


def _difference_of_tangents(tangent, primals, tangents, classes):
    (x, y), (dx, dy) = primals, tangents
    if isinstance(dx, SymbolicZero):
        return tangent(dy, y, classes)
    if isinstance(dy, SymbolicZero):
        return -tangent(dx, x, classes)
    return tangent(dy, y, classes) - tangent(dx, x, classes)


def compare(x, y, classes):
    """p = softmax(x), q = softmax(y), and δ = log q/p, relatively accurate also where p ≈ q."""
    # As a chain it would have to take y - n and x - m apart, each with its rounding.
    sums = classes._replace(way=Way.REDUCTION) if classes.way is Way.CHAIN else classes
    nx, ny = normalizer(x, sums), normalizer(y, sums)
    log_z_y_x = ny.log_z - nx.log_z
    # δ = (y - m_y) - (x - m_x) - log Z_y/Z_x up to a number a row, by the rounding of the last. That number is
    # Σ p (e^δ - 1) = Σ (q - p), which ought to be 0.
    p, q, difference = _probabilities_and_difference(x, y, nx, ny, 0 * nx.s, 0.25, classes)
    surplus = classes.sum(difference_from_log(p, q, difference - classes.column(log_z_y_x)))
    p, q, difference = _probabilities_and_difference(x, y, nx, ny, surplus * surplus, 0.5, classes)
    # log(1 + S) of so small a number, said as an odd function, so that log p/q is -δ to the bit.
    return p, q, difference - classes.column(log_z_y_x + jnp.copysign(log1p(jnp.abs(surplus)), surplus))


def _probabilities_and_difference(x, y, nx, ny, s, k, classes):
    # A TPU's passes share these, for then two sums of it are one pass.
    m, n = (except_on_tpu(another, sums.m, s) for sums in (nx, ny))
    d_x, dominant_x = nx.depth_and_dominant(x, m, classes)
    d_y, dominant_y = ny.depth_and_dominant(y, n, classes)
    p, q = exp(d_x) / classes.column(nx.z), exp(d_y) / classes.column(ny.z)
    # Of a class that dominates both, what it is apart is the rounding of x and y, and 0 by definition.
    both = dominant_x & dominant_y
    return p, q, jnp.where(both, jnp.zeros_like(x), _difference(x, y, m, n, classes, k))


def _difference(x, y, m, n, classes, k):
    """(y - n) - (x - m) with a single rounding where it is small; -∞ where only y is, and a number where x is -∞.

    k < 1 differs between the calls, as their m and n do: a constant that two passes share is stored N × n times too.
    """
    least = jnp.finfo(x.dtype).min
    # Logits far below the maximum, of probability 0.
    low_x, low_y = (classes.column(jnp.maximum(maximum + k * least, least)) for maximum in (m, n))
    x, finite_y = jnp.maximum(x, low_x), jnp.maximum(y, low_y)
    n_m, lost = two_sum(n, -m)
    return ((y - x) - classes.column(n_m)) + (two_sum(finite_y, -x)[1] - classes.column(lost))
