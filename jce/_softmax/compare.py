"""Two rows of logits compared: p, q, δ = log q/p and q - p, accurate even if p ≈ q.

Dividing logits x and y by a temperature rounds each of them, so their difference y - x loses digits. So d = y - x may
be a separate argument, computed without this loss. Otherwise d is None. If d is differentiated too, as for a derivative
with respect to the temperature, the tangents of both rows are combined by formulas in which nothing cancels if p ≈ q:

    d log pᵢ = dxᵢ - Σ p dx        d log qᵢ/pᵢ = ddᵢ - Σ p dd - Σ (q - p) dy
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jce._jax.arguments import is_array
from jce._jax.classes import Classes
from jce._jax.varying import like, vary_over, varying
from jce._numerics.calculus import custom_jvp
from jce._numerics.deviance import deviance_from_log, difference_from_log
from jce._numerics.elementary import log1p, two_sum
from jce._numerics.mul0 import mul0, over
from jce._softmax.backend import Backend
from jce._softmax.kernel import kernel
from jce._softmax.softmax import centered, softmax, softmax_tangent


@functools.partial(custom_jvp, nondiff_argnums=(3,))
@kernel
def q_minus_p(x, y, d, backend):
    return difference_from_log(*compare(x, y, d, backend))


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
def log_q_over_p(x, y, d, backend):
    return compare(x, y, d, backend)[2]


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
def deviances(x, y, d, backend):
    """qᵢ - pᵢ - pᵢ log qᵢ/pᵢ ≥ 0, whose sum is KL(p‖q). Its rule expects tangents of x, y and d."""
    return deviance_from_log(*compare(x, y, d, backend))


# d (qᵢ - pᵢ - pᵢδᵢ) = (qᵢ - pᵢ - pᵢδᵢ) d log pᵢ + (qᵢ - pᵢ) dδᵢ = (qᵢ - pᵢ) d log qᵢ - pᵢδᵢ d log pᵢ
@deviances.defjvp
def _deviances_rule(classes, primals, tangents):
    terms, difference = deviances(*primals, classes), q_minus_p(*primals, classes)
    near, d_log_p, d_log_q, d_delta = _tangents_of_logarithms(primals, tangents, classes)
    weighted = mul0(log_q_over_p(*primals, classes), softmax(primals[0], classes))
    far = mul0(difference, d_log_q) - mul0(weighted, d_log_p)
    return terms, jnp.where(near, mul0(terms, d_log_p) + mul0(difference, d_delta), far)


def one_at_a_time(tangents) -> bool:
    """Whether x, y or d has no tangent. The formulas above need all three tangents. If one is missing, a rule uses the
    difference of the two rows' tangents instead, or the only tangent that there is."""
    return any(t is None or isinstance(t, SymbolicZero) for t in tangents)


def _tangents_of_logarithms(primals, tangents, classes):
    """Returns a mask, which is True where |log q/p| < 3/2, and d log p, d log q and d log q/p. The last one is computed
    by the formula at the top of this file. It is needed only where the mask is True: elsewhere d log q - d log p is
    accurate enough."""
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
    """(x - max x)/t, for a number t per row. If all entries share a large offset, x/t would lose digits to it."""
    t = jnp.broadcast_to(vary_over(varying(x), classes.column(t))[0], x.shape)
    x = x - classes.column(classes.max(lax.stop_gradient(x)))
    return _over_where_possible(x, t, x)


def _over_where_possible(z, t, *rows):
    """z/t. Where an entry of one of the rows is -∞, the derivative of z/t with respect to t is 0 instead of NaN."""
    possible = functools.reduce(jnp.minimum, map(lax.stop_gradient, rows)) > -jnp.inf
    return over(z, jnp.where(possible, t, lax.stop_gradient(t)))


def at_common_temperature(
    x: Array, y: Array, temperature: float | Array, classes: Classes
) -> tuple[Array, Array, Array | None]:
    """Both rows divided by one temperature, up to a constant per row, and the difference of the results. The difference
    is (y - x)/T, which is more accurate than y/T - x/T. It is None if the division by T is exact. It has a derivative
    only if the temperature is traced."""
    if not is_array(temperature):
        if temperature == 1:
            return x, y, None
        if math.frexp(temperature)[0] == 0.5:  # a power of 2
            t = like(jnp.asarray(temperature, x.dtype), x)
            return over(x, t), over(y, t), None
    x, y, d = divided(x, y, jnp.asarray(temperature, x.dtype), classes)
    return x, y, d if is_array(temperature) else lax.stop_gradient(d)


def divided(x: Array, y: Array, t: Array, classes: Classes) -> tuple[Array, Array, Array]:
    """(x - max x)/t, (y - max y)/t, and their difference, which is rounded only once before it is divided by t."""
    m_x, m_y = (classes.max(lax.stop_gradient(z)) for z in (x, y))
    t, difference = like(t.astype(x.dtype), x), _difference_of_rows(x, y, m_x, m_y, classes)
    return (
        _over_where_possible(x - classes.column(m_x), t, x),
        _over_where_possible(y - classes.column(m_y), t, y),
        _over_where_possible(difference, t, x, y),
    )


@functools.partial(custom_jvp, nondiff_argnums=(4,))
def _difference_of_rows(x, y, m_x, m_y, classes):
    return _difference(x, y, m_x, m_y, classes, 0.25)


@_difference_of_rows.defjvp
def _difference_of_rows_rule(classes, primals, tangents):
    dx, dy, *_ = tangents
    return _difference_of_rows(*primals, classes), dy - dx


@functools.partial(jax.jit, static_argnums=(3, 4))
def compare(x: Array, y: Array, d: Array | None, backend: Backend, stored: bool = False) -> tuple[Array, Array, Array]:
    """p = softmax(x), q = softmax(y), and δ = log q/p, accurate even if p ≈ q.

    With `stored`, these arrays are computed once and kept in memory, for a kernel that reads them several times.
    """
    (nx, of_x), (ny, of_y) = (backend.comparison(z, stored) for z in (x, y))
    log_z_y_x = ny.log_z - nx.log_z

    def of_pass(s, fraction):
        (m_x, p, dominant_x), (m_y, q, dominant_y) = of_x(s), of_y(s)
        difference = _difference(x, y, m_x, m_y, backend, fraction) if d is None else d
        # If a class dominates both rows (`softmax.py`), x - m_x and y - m_y are set to 0 there.
        # Their computed difference would only be rounding error, so it is set to 0 too.
        return p, q, jnp.where(dominant_x & dominant_y, jnp.zeros_like(x), difference)

    # δ = (y - m_y) - (x - m_x) - log Z_y/Z_x. The rounding error of the logarithm is the same for the whole row.
    # Without it, S = Σ (q - p) = Σ p (e^δ - 1) would be 0. A second pass subtracts log(1 + S), which removes the error.
    p, q, difference = of_pass(0 * nx.s, 0.25)
    surplus = backend.sum(difference_from_log(p, q, difference - backend.column(log_z_y_x)))
    p, q, difference = of_pass(surplus * surplus, 0.5)
    # log(1 + S) is approximated to first order by an odd function of S, so exchanging p and q gives exactly -δ.
    delta = difference - backend.column(log_z_y_x + jnp.copysign(log1p(jnp.abs(surplus)), surplus))
    return (p, q, backend.stored(delta)) if stored else (p, q, delta)


def _difference(x, y, m_x, m_y, classes, fraction):
    """(y - m_y) - (x - m_x), with a single rounding where it is small: -∞ where y is, and finite where only x is -∞.

    Each pass calls it with a different fraction < 1, and with different m_x and m_y. So the passes share no array. XLA
    would store a shared one (`passes.py`).
    """
    least = jnp.finfo(x.dtype).min
    # A -∞ in x is raised to a number whose probability is 0. A -∞ in y is raised only in the error term, which would be
    # NaN otherwise: the difference itself stays -∞.
    low_x, low_y = (classes.column(jnp.maximum(maximum + fraction * least, least)) for maximum in (m_x, m_y))
    x, finite_y = jnp.maximum(x, low_x), jnp.maximum(y, low_y)
    rise, lost = two_sum(m_y, -m_x)
    return ((y - x) - classes.column(rise)) + (two_sum(finite_y, -x)[1] - classes.column(lost))
