"""The weighted Jensen-Shannon divergence at p = softmax(x) and q = softmax(y), accurate even if p ≈ q."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._jax.arguments import positive
from jce._jax.public import public
from jce._jax.rows import distributions
from jce._numerics.calculus import custom_jvp, def_at_once, ratio, sum_of_tangents
from jce._numerics.deviance import difference_from_log, log_ratio
from jce._numerics.mul0 import mul0
from jce._quantities.jensen_shannon import (
    checked_weights,
    divergence,
    imbalance,
    relative_difference,
    times,
    with_mixture,
)
from jce._softmax.compare import at_common_temperature, compare, q_minus_p
from jce._softmax.kernel import kernel, storing_kernel
from jce._softmax.softmax import centered, softmax


@public("axis", "axis_name", numbers=("beta", "temperature"))
def jensen_shannon_divergence_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The Jensen-Shannon divergence of two distributions given by logits, in nats.

    β KL(p‖m) + (1-β) KL(q‖m) with m = βp + (1-β)q, p = softmax(p_logits) and q = softmax(q_logits)

    Example:
      >>> print(jce.jensen_shannon_divergence_with_logits(jnp.array([50.0, 0.0]), jnp.array([60.0, 0.0])))
      6.680025e-23

    The divergence is 0 only if p = q or if it underflows. It is at most H(β) = β log 1/β + (1-β) log 1/(1-β) ≤ log 2.
    Its relative error is small even if p ≈ q. It is symmetric at β = 1/2. Otherwise, exchanging p and q is the same as
    exchanging β and 1-β.

    Args:
      p_logits: real, [..., n, ...], logits (or log-probabilities) of n classes along `axis`.
      q_logits: real, [..., n, ...], the logits of q. Batch axes broadcast, the class axis doesn't.
      beta: β, the weight of p in the mixture, a number above 0 and below 1.
      temperature: T > 0, a number by which both rows of logits are divided. The division by T is done after the
        subtraction of the two rows, so nearly equal rows are compared as accurately as at T = 1.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to both. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p_logits or q_logits is.

    At the boundary:
      A logit of -∞ is a class of probability 0, and the derivative with respect to this logit is 0. If the class has a
      logit of -∞ in one distribution only, its probability in the other still contributes. A row with a NaN, a +∞ or
      only -∞ is NaN. A traced β of 0 or 1 gives 0, the limit, with derivatives 0 with respect to the logits. At
      such a β, the derivative with respect to β is infinite if the mixture lacks a class that p or q has, and mixed
      derivatives with respect to β and the logits are unspecified.

    Derivative:
      ∂/∂p_logitsᵢ = β pᵢ (log pᵢ/mᵢ - KL(p‖m)), ∂/∂q_logitsᵢ = (1-β) qᵢ (log qᵢ/mᵢ - KL(q‖m)), each in its argument's
      dtype. The derivative with respect to a traced β is KL(p‖m) - KL(q‖m). At a temperature T the first two are
      divided by T. The derivative with respect to a traced T may have a large relative error if p ≈ q.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit, beta is not above 0 and below 1, or temperature not above 0.

    Not checked:
      Logits ≤ 4e37 in float32 (an eighth of the largest float). Larger ones overflow.

    See "Arguments", "Excluded classes", "Conventions" and "Classes split over devices" in jce/README.md.
    """
    name = "jensen_shannon_divergence_with_logits"
    (x, y), classes = distributions(
        name, axis, where, axis_name, in_logits=("p_logits", "q_logits"), p_logits=p_logits, q_logits=q_logits
    )
    b, c = (jnp.asarray(weight, x.dtype) for weight in checked_weights(name, x.dtype, beta))
    t = positive(name, x.dtype, temperature=temperature)
    x, y, d = at_common_temperature(x, y, t, classes)
    return _divergence_of_softmax(x, y, None if d is None else lax.stop_gradient(d), b, c, classes)


# d is y - x, computed more accurately than from x and y (`compare.py`), or None. Derivative rules use the tangents of x
# and y, and treat d as a constant.


@functools.partial(custom_jvp, nondiff_argnums=(5,))
@kernel
def _divergence_of_softmax(x, y, d, b, c, backend):
    return backend.sum(divergence(*_consistent(*compare(x, y, d, backend)), b, c))


def _consistent(p, q, delta):
    """p, q and p - q for δ = log q/p, made consistent: where |δ| < 3/2, the greater of p and q is recomputed as the
    lesser plus the difference. Without this, the rounding of p and q would dominate D, which is of second order in
    p - q."""
    d = -difference_from_log(p, q, delta)
    near = jnp.abs(delta) < 1.5
    return jnp.where(near & (d > 0), q + d, p), jnp.where(near & (d < 0), p - d, q), d


# ∂/∂xᵢ = β pᵢ (log pᵢ/mᵢ - Σ p log p/m), ∂/∂yᵢ = (1-β) qᵢ (log qᵢ/mᵢ - Σ q log q/m), ∂/∂β = Σ (D(p, m) - D(q, m))
def _divergence_of_softmax_rule(classes, primals, tangents):
    jsd, in_x, in_y = _divergence_and_partials(*primals, classes)
    return jsd, sum_of_tangents(
        _in_rows_and_weight(tangents),
        lambda dx: classes.sum(mul0(in_x, dx)),
        lambda dy: classes.sum(mul0(in_y, dy)),
        lambda db: times(_imbalance_of_softmax(*primals, classes), db),
    )


_divergence_of_softmax.defjvp(_divergence_of_softmax_rule, symbolic_zeros=True)


def _in_rows_and_weight(tangents):
    dx, dy, _, db, _ = tangents
    return dx, dy, db


@functools.partial(custom_jvp, nondiff_argnums=(5,))
@storing_kernel
def _divergence_and_partials(x, y, d, b, c, backend):
    # One kernel computes all three results, since each of them compares x and y.
    p, q, delta = compare(x, y, d, backend, stored=True)
    in_x = _weighted_excess_of(p, _log_p_over_m_up_to(p, q, delta, x, y, b, c, backend), b, x, backend)
    in_y = _weighted_excess_of(q, _log_p_over_m_up_to(q, p, -delta, y, x, c, b, backend), c, y, backend)
    return backend.sum(divergence(*_consistent(p, q, delta), b, c)), in_x, in_y


def _weighted_excess(x, y, d, b, c, backend):
    """β pᵢ (log pᵢ/mᵢ - Σ p log p/m)"""
    log_p_m = _log_p_over_m_of_softmax(x, y, d, b, c, backend)
    return _weighted_excess_of(softmax(x, backend), log_p_m, b, x, backend)


def _weighted_excess_of(p, log_p_m, b, x, backend):
    excess = centered(mul0(_where_possible(p, log_p_m), b * jnp.ones_like(p)), x, backend)
    return mul0(excess, p)


def_at_once(
    _divergence_and_partials,
    _divergence_of_softmax,
    _weighted_excess,
    lambda x, y, d, b, c, classes: _weighted_excess(y, x, _negative(d), c, b, classes),
)


def _negative(d):
    return None if d is None else -d


@functools.partial(custom_jvp, nondiff_argnums=(5,))
@kernel
def _log_p_over_m_of_softmax(x, y, d, b, c, backend):
    """log p/m plus a constant per row, which centering removes later: log βp/m in rows where p and q barely overlap."""
    p, q, delta = compare(x, y, d, backend, stored=True)
    return _log_p_over_m_up_to(p, q, delta, x, y, b, c, backend)


def _log_p_over_m_up_to(p, q, delta, x, y, b, c, backend):
    # Centering this result later does not remove its rounding. So each row has log p/m or log βp/m, whichever is
    # smaller in the mean. Both have the same size where m² = βp², that is, at q/p = (√β - β)/(1-β) = √β/(1 + √β) =
    # 1/limit.
    limit = 1 + 1 / jnp.sqrt(jnp.maximum(b, jnp.finfo(b.dtype).tiny))
    far = backend.column(backend.sum(jnp.maximum(p - limit * q, -p)) > 0)
    _, p, q, d, m = with_mixture(p, q, -difference_from_log(p, q, delta), b, c)
    of_p = jnp.maximum(b * p, jnp.finfo(p.dtype).tiny)
    return log_ratio(jnp.where(far, of_p, p), m, jnp.where(far, -c * q, c * d))


# d log p/m = (1-β) q/m (d log p - d log q) - (p - q)/m dβ
def _log_p_over_m_of_softmax_rule(classes, primals, tangents):
    x, y, d, b, c = primals
    p, q = softmax(x, classes), softmax(y, classes)
    m = b * p + c * q
    return _log_p_over_m_of_softmax(*primals, classes), sum_of_tangents(
        _in_rows_and_weight(tangents),
        lambda dx: mul0(c * ratio(q, m), centered(dx, x, classes)),
        lambda dy: -mul0(c * ratio(q, m), centered(dy, y, classes)),
        lambda db: times(ratio(q_minus_p(x, y, d, classes), m), db),
    )


_log_p_over_m_of_softmax.defjvp(_log_p_over_m_of_softmax_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(5,))
@kernel
def _imbalance_of_softmax(x, y, d, b, c, backend):
    return backend.sum(imbalance(*_consistent(*compare(x, y, d, backend)), b, c))


# d Σ (D(p, m) - D(q, m)): the partials of `_imbalance_rule` in each class, with dpᵢ = pᵢ d log pᵢ
def _imbalance_of_softmax_rule(classes, primals, tangents):
    x, y, d, b, c = primals
    p, q, difference = softmax(x, classes), softmax(y, classes), -q_minus_p(x, y, d, classes)
    b_, c_ = (weight * jnp.ones_like(p) for weight in (b, c))
    relative = relative_difference(p, q, difference, b_, c_)
    slope_p = _where_possible(p, _log_p_over_m_of_softmax(x, y, d, b, c, classes)) - mul0(relative, b_)
    slope_q = -_where_possible(q, _log_p_over_m_of_softmax(y, x, _negative(d), c, b, classes)) - mul0(relative, c_)
    terms = sum_of_tangents(
        _in_rows_and_weight(tangents),
        lambda dx: mul0(p * slope_p, centered(dx, x, classes)),
        lambda dy: mul0(q * slope_q, centered(dy, y, classes)),
        lambda db: times(-difference * relative, db),
    )
    return _imbalance_of_softmax(*primals, classes), classes.sum(terms)


_imbalance_of_softmax.defjvp(_imbalance_of_softmax_rule, symbolic_zeros=True)


def _where_possible(p, log_p_m):
    return jnp.where(p == 0, jnp.zeros_like(p), log_p_m)
