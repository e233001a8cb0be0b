"""Two rows of logits compared: p, q, log q/p and q - p, relatively accurate also where the two are nearly the same.

Logits that are divided by a temperature are rounded each by itself, and what they are apart is lost. So d = y - x may
be an argument of its own, which knows it better than x and y do, or None. If it is differentiated too, as along the
temperature, a derivative along both rows at once is made of their small difference, by

    d log pᵢ = dxᵢ - Σ p dx        d log qᵢ/pᵢ = ddᵢ - Σ p dd - Σ (q - p) dy
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jce._calculus import custom_jvp
from jce._classes import Classes, like, vary_over, varying
from jce._deviance import deviance_from_log, difference_from_log
from jce._elementary import log1p, two_sum
from jce._mul0 import mul0, over
from jce._softmax import centered, softmax, softmax_tangent
from jce._ways.kernel import kernel
from jce._ways.way import Way


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def q_minus_p(x, y, d, classes):
    return difference_from_log(*compare(x, y, d, classes))


# d (qᵢ - pᵢ) = qᵢ (dyᵢ - Σ q dy) - pᵢ (dxᵢ - Σ p dx) = (qᵢ - pᵢ) d log pᵢ + qᵢ d log qᵢ/pᵢ
def _q_minus_p_rule(classes, primals, tangents):
    r = q_minus_p(*primals, classes)
    if one_at_a_time(tangents):
        return r, _difference_of_tangents(_softmax_tangent, primals, tangents, classes)
    p, q = (softmax(z, classes) for z in primals[:2])
    near, d_log_p, d_log_q, d_delta = _tangents_of_logarithms(primals, tangents, classes)
    return r, jnp.where(near, mul0(r, d_log_p) + mul0(q, d_delta), mul0(q, d_log_q) - mul0(p, d_log_p))


q_minus_p.defjvp(_q_minus_p_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def log_q_over_p(x, y, d, classes):
    return compare(x, y, d, classes)[2]


# d log qᵢ/pᵢ = (dyᵢ - Σ q dy) - (dxᵢ - Σ p dx)
def _log_q_over_p_rule(classes, primals, tangents):
    if one_at_a_time(tangents):
        tangent = _difference_of_tangents(centered, primals, tangents, classes)
    else:
        near, d_log_p, d_log_q, d_delta = _tangents_of_logarithms(primals, tangents, classes)
        tangent = jnp.where(near, d_delta, d_log_q - d_log_p)
    return log_q_over_p(*primals, classes), tangent


log_q_over_p.defjvp(_log_q_over_p_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def deviances(x, y, d, classes):
    """qᵢ - pᵢ - pᵢ log qᵢ/pᵢ ≥ 0, of which KL(p‖q) is the sum; differentiated along both rows at once."""
    return deviance_from_log(*compare(x, y, d, classes))


# d (qᵢ - pᵢ - pᵢδᵢ) = (qᵢ - pᵢ - pᵢδᵢ) d log pᵢ + (qᵢ - pᵢ) dδᵢ = (qᵢ - pᵢ) d log qᵢ - pᵢδᵢ d log pᵢ
@deviances.defjvp
def _deviances_rule(classes, primals, tangents):
    terms, difference = deviances(*primals, classes), q_minus_p(*primals, classes)
    near, d_log_p, d_log_q, d_delta = _tangents_of_logarithms(primals, tangents, classes)
    weighted = mul0(log_q_over_p(*primals, classes), softmax(primals[0], classes))
    apart = mul0(difference, d_log_q) - mul0(weighted, d_log_p)
    return terms, jnp.where(near, mul0(terms, d_log_p) + mul0(difference, d_delta), apart)


def one_at_a_time(tangents) -> bool:
    """Whether a derivative is along one row alone, or along rows of which nothing knows better how they move apart."""
    return any(t is None or isinstance(t, SymbolicZero) for t in tangents)


def _tangents_of_logarithms(primals, tangents, classes):
    """Where p and q are near, d log p, d log q, and d log q/p there; elsewhere it is the difference of those."""
    (x, y, _), (dx, dy, dd) = primals, tangents
    near = jnp.abs(lax.stop_gradient(log_q_over_p(*primals, classes))) < 1.5
    mean = classes.sum(mul0(q_minus_p(*primals, classes), dy))
    d_delta = centered(dd, x, classes) - classes.column(mean)
    return near, centered(dx, x, classes), centered(dy, y, classes), d_delta


def _softmax_tangent(t, x, classes):
    return softmax_tangent(t, x, None, classes)


def _difference_of_tangents(tangent, primals, tangents, classes):
    (x, y, _), (dx, dy, _) = primals, tangents
    if isinstance(dx, SymbolicZero):
        return tangent(dy, y, classes)
    if isinstance(dy, SymbolicZero):
        return -tangent(dx, x, classes)
    return tangent(dy, y, classes) - tangent(dx, x, classes)


def tempered(x: Array, t: Array, classes: Classes) -> Array:
    """Logits counted from their maximum and divided by t, a number a row: of x/t the rounding would be that of all that
    they have in common."""
    t = jnp.broadcast_to(vary_over(varying(x), classes.column(t))[0], x.shape)
    x = x - classes.column(classes.max(lax.stop_gradient(x)))
    return _over_where_possible(x, t, x)


def _over_where_possible(z, t, *rows):
    """z/t; and where one of some rows is -∞ no derivative in t, of what z is whatever t."""
    possible = functools.reduce(jnp.minimum, map(lax.stop_gradient, rows)) > -jnp.inf
    return over(z, jnp.where(possible, t, lax.stop_gradient(t)))


def divided(x: Array, y: Array, t: Array, classes: Classes) -> tuple[Array, Array, Array]:
    """Each row's logits counted from its maximum, and their difference, exact but for a rounding, all divided by t."""
    m, n = (classes.max(lax.stop_gradient(z)) for z in (x, y))
    t, difference = like(t.astype(x.dtype), x), _difference_of_rows(x, y, m, n, classes)
    return (
        _over_where_possible(x - classes.column(m), t, x),
        _over_where_possible(y - classes.column(n), t, y),
        _over_where_possible(difference, t, x, y),
    )


@functools.partial(custom_jvp, nondiff_argnums=(4,))
def _difference_of_rows(x, y, m, n, classes):
    return _difference(x, y, m, n, classes, 0.25)


@_difference_of_rows.defjvp
def _difference_of_rows_rule(classes, primals, tangents):
    dx, dy, *_ = tangents
    return _difference_of_rows(*primals, classes), dy - dx


@functools.partial(jax.jit, static_argnums=(3, 4))
def compare(x: Array, y: Array, d: Array | None, classes: Way, stored: bool = False) -> tuple[Array, Array, Array]:
    """p = softmax(x), q = softmax(y), and δ = log q/p, relatively accurate also where p ≈ q.

    Stored, for a kernel that reads them several times.
    """
    (nx, of_x), (ny, of_y) = (classes.comparison(z, stored) for z in (x, y))
    log_z_y_x = ny.log_z - nx.log_z

    def of_pass(s, k):
        (m, p, dominant_x), (n, q, dominant_y) = of_x(s), of_y(s)
        apart = _difference(x, y, m, n, classes, k) if d is None else d
        # Of a class that dominates both, what it is apart is the rounding of x and y, and 0 by definition.
        return p, q, jnp.where(dominant_x & dominant_y, jnp.zeros_like(x), apart)

    # δ = (y - m_y) - (x - m_x) - log Z_y/Z_x up to a number a row, by the rounding of the last. That number is
    # Σ p (e^δ - 1) = Σ (q - p), which ought to be 0.
    p, q, difference = of_pass(0 * nx.s, 0.25)
    surplus = classes.sum(difference_from_log(p, q, difference - classes.column(log_z_y_x)))
    p, q, difference = of_pass(surplus * surplus, 0.5)
    # log(1 + S) of so small a number, said as an odd function, so that log p/q is -δ to the bit.
    delta = difference - classes.column(log_z_y_x + jnp.copysign(log1p(jnp.abs(surplus)), surplus))
    return (p, q, classes.stored(delta)) if stored else (p, q, delta)


def _difference(x, y, m, n, classes, k):
    """(y - n) - (x - m) with a single rounding where it is small; -∞ where only y is, and a number where x is -∞.

    k < 1 differs between the calls, as their m and n do, so that two passes share nothing (`_ways/passes.py`).
    """
    least = jnp.finfo(x.dtype).min
    # Logits far below the maximum, of probability 0.
    low_x, low_y = (classes.column(jnp.maximum(maximum + k * least, least)) for maximum in (m, n))
    x, finite_y = jnp.maximum(x, low_x), jnp.maximum(y, low_y)
    n_m, lost = two_sum(n, -m)
    return ((y - x) - classes.column(n_m)) + (two_sum(finite_y, -x)[1] - classes.column(lost))
