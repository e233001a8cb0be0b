"""β KL(p‖m) + (1-β) KL(q‖m) with m = βp + (1-β)q: how far two distributions are from their mixture.

With D(p, m) = p log p/m - p + m (`deviance.py`) it is Σ β D(p, m) + (1-β) D(q, m), since β(p - m) + (1-β)(q - m) = 0.
Each D is accurate given p - m = (1-β)(p - q) and q - m = -β(p - q). The derivatives are

    ∂/∂p = β log p/m        ∂/∂q = (1-β) log q/m        ∂/∂β = D(p, m) - D(q, m)

For 0 < β < 1, m = 0 only where p = q = 0. So nothing is infinite except log p/m at p = 0 < m, and log q/m at q = 0 < m.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jce._jax.arguments import fraction, is_array
from jce._jax.public import public
from jce._jax.rows import distributions
from jce._numerics.calculus import custom_jvp, over_if_present, ratio, sum_of_tangents
from jce._numerics.deviance import deviance, log_ratio
from jce._numerics.elementary import at_least, one_minus, raising, unless_negative
from jce._numerics.mul0 import mul0


@public("axis", numbers=("beta",))
def jensen_shannon_divergence(
    p: ArrayLike, q: ArrayLike, *, beta: ArrayLike = 0.5, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """The Jensen-Shannon divergence of two distributions, in nats.

    β KL(p‖m) + (1-β) KL(q‖m) with m = βp + (1-β)q

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.0, 0.5, 0.5])
      >>> print(jce.jensen_shannon_divergence(p, q), jce.jensen_shannon_divergence(p, p))
      0.3465736 0.0

    The divergence is 0 only if p = q or if it underflows. It is at most H(β) = β log 1/β + (1-β) log 1/(1-β) ≤ log 2,
    and reaches H(β) if no class is possible in both p and q. It is symmetric at β = 1/2. Otherwise, exchanging
    p and q is the same as exchanging β and 1-β. It equals H(m) - βH(p) - (1-β)H(q), but its relative error is small
    even if p ≈ q. Divided by β it tends to KL(p‖q) as β → 0, and divided by 1-β it tends to KL(q‖p) as β → 1.

    Args:
      p: real, [..., n, ...], probabilities of n classes along `axis`.
      q: real, [..., n, ...], the second distribution. Batch axes broadcast, the class axis doesn't.
      beta: β, the weight of p in the mixture, a number above 0 and below 1.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to p and q. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or q is.

    At the boundary:
      A class with pᵢ = 0 < qᵢ contributes (1-β) qᵢ log 1/(1-β), with ∂/∂pᵢ = -∞, the one-sided limit. A class with qᵢ =
      0 < pᵢ contributes β pᵢ log 1/β, with ∂/∂qᵢ = -∞. A class with pᵢ = qᵢ = 0 is absent: both derivatives are 0. A
      traced β of 0 or 1 gives 0, the limit, with derivatives 0 with respect to p and q. The derivative with respect to
      β is then infinite if the mixture lacks a class that p or q has.

    Derivative:
      ∂/∂pᵢ = β log pᵢ/mᵢ, ∂/∂qᵢ = (1-β) log qᵢ/mᵢ, each in its argument's dtype. The derivative with respect to a
      traced β is Σᵢ (pᵢ log pᵢ/mᵢ - qᵢ log qᵢ/mᵢ - pᵢ + qᵢ).

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit, or beta is not above 0 and below 1.

    Not checked:
      Σ pᵢ = Σ qᵢ = 1 (see `check_distribution`). A negative pᵢ or qᵢ gives NaN, from its logarithm.

    Source:
      J. Lin, Divergence Measures Based on the Shannon Entropy (1991), section IV.

    See "Arguments", "Excluded classes" and "Conventions" in jce/README.md.
    """
    name = "jensen_shannon_divergence"
    (p, q), classes = distributions(name, axis, where, p=p, q=q)
    b, c = (weight * jnp.ones_like(p) for weight in checked_weights(name, p.dtype, beta))
    return classes.sum(_divergence(p, q, b, c))


def checked_weights(function, dtype, beta):
    """β and 1-β. For a Python number, each is rounded once, and it is an error if one of them rounds to 0."""
    advice = (
        "At β = 0 and β = 1 the divergence is 0 for all p and q. Divided by β it tends to KL(p‖q) as β → 0, and divided"
        " by 1-β it tends to KL(q‖p) as β → 1: use kl_divergence or kl_divergence_with_logits."
    )
    b = fraction(function, dtype, ends=False, advice=advice, beta=beta)
    return b, one_minus(b) if is_array(b) else 1 - b


# β = b and 1-β = c are two arguments: if one is near 1, computing the other from it would lose digits. Rules use the
# tangent of β only, and ignore the tangent of c, since it is always -dβ.


@custom_jvp
def _divergence(p, q, b, c):
    return divergence(p, q, p - q, b, c)


def divergence(p: Array, q: Array, d: Array, b: Array, c: Array) -> Array:
    """β D(p, m) + (1-β) D(q, m) per class, for d = p - q. Not differentiable."""
    scale, sp, sq, sd, m = with_mixture(p, q, d, b, c)
    terms = (b * deviance(sp, m, c * sd) + c * deviance(sq, m, -b * sd)) / scale
    # The select comes last, so that on a CPU one loop stores the terms: XLA's sum is slow at long formulas
    # (`passes.py`).
    return unless_negative(jnp.minimum(p, q), terms)


def with_mixture(p, q, d, b, c):
    """Returns a power of 2, and p, q, p - q and m, each multiplied by it. Without this factor, a small β p might
    underflow to m = 0. The returned m is above 0 even at β = 0."""
    scale = raising(p, q)
    p, q, d = scale * p, scale * q, scale * d
    return scale, p, q, d, at_least(jnp.finfo(p.dtype).tiny, b * p + c * q)


def _is_empty(p, q, b, c):
    """Where m = 0: p and q both lack the class or, at β of 0 or 1, the distribution with weight 1 lacks it. A test of
    m == 0 would also find classes where β p underflows."""
    return ((b == 0) | (p == 0)) & ((c == 0) | (q == 0))


@custom_jvp
def relative_difference(p, q, d, b, c):
    """(p - q)/m, for d = p - q: ±∞ where the mixture lacks a class that p or q has."""
    empty = _is_empty(p, q, b, c)
    _, _, _, d, m = with_mixture(p, q, d, b, c)
    return ratio(d, jnp.where(empty, jnp.zeros_like(m), m))


# d (p - q)/m = (d(p - q) - (p - q)/m dm) / m. m isn't scaled here: a cotangent divided by a scaled m would underflow.
def _relative_difference_rule(primals, tangents):
    p, q, d, b, c = primals
    relative, m = relative_difference(*primals), b * p + c * q
    change = sum_of_tangents(
        tangents,
        lambda dp: -mul0(mul0(relative, b), dp),
        lambda dq: -mul0(mul0(relative, c), dq),
        lambda dd: dd,
        lambda db: -mul0(mul0(relative, p), db),
        lambda dc: -mul0(mul0(relative, q), dc),
    )
    return relative, over_if_present(change, d, m)


relative_difference.defjvp(_relative_difference_rule, symbolic_zeros=True)


def _divergence_rule(primals, tangents):
    p, q, b, c = primals
    return _divergence(*primals), sum_of_tangents(
        tangents[:3],
        lambda dp: mul0(mul0(_log_p_over_m(p, q, b, c), b), dp),
        lambda dq: mul0(mul0(_log_p_over_m(q, p, c, b), c), dq),
        lambda db: mul0(_imbalance(p, q, b, c), db),
    )


_divergence.defjvp(_divergence_rule, symbolic_zeros=True)


@custom_jvp
def _log_p_over_m(p, q, b, c):
    _, sp, _, sd, m = with_mixture(p, q, p - q, b, c)
    log_p_m = jnp.where((p > 0) & _is_empty(p, q, b, c), jnp.full_like(p, jnp.inf), log_ratio(sp, m, c * sd))
    return unless_negative(jnp.minimum(p, q), log_p_m)


# d log p/m = ((1-β) (q/p dp - dq) - (p - q) dβ) / m. The factor 1-β comes last: a small 1-β times a tangent as small as
# p would underflow.
def _log_p_over_m_rule(primals, tangents):
    (p, q, b, c), (dp, dq, db, _) = primals, tangents
    m, terms = b * p + c * q, []
    if not (isinstance(dp, SymbolicZero) and isinstance(dq, SymbolicZero)):
        difference = sum_of_tangents((dp, dq), lambda dp: mul0(ratio(q, p), dp), lambda dq: -dq)
        terms.append(mul0(c, over_if_present(difference, p, m)))
    if not isinstance(db, SymbolicZero):
        terms.append(mul0(-ratio(p - q, m), db))
    return _log_p_over_m(*primals), functools.reduce(jnp.add, terms)


_log_p_over_m.defjvp(_log_p_over_m_rule, symbolic_zeros=True)


@custom_jvp
def _imbalance(p, q, b, c):
    """D(p, m) - D(q, m)"""
    return imbalance(p, q, p - q, b, c)


def imbalance(p: Array, q: Array, d: Array, b: Array, c: Array) -> Array:
    """D(p, m) - D(q, m), for d = p - q. At β of 0 or 1 it is ±∞ where m = 0 but p or q isn't. Not differentiable."""
    scale, sp, sq, sd, m = with_mixture(p, q, d, b, c)
    difference = (deviance(sp, m, c * sd) - deviance(sq, m, -b * sd)) / scale
    lacking = _is_empty(p, q, b, c) & (p != q)
    return unless_negative(jnp.minimum(p, q), jnp.where(lacking, jnp.copysign(jnp.inf, p - q), difference))


# ∂/∂p = log p/m - β (p - q)/m, ∂/∂q = -log q/m - (1-β) (p - q)/m, ∂/∂β = -(p - q)²/m
def _imbalance_rule(primals, tangents):
    p, q, b, c = primals
    relative = relative_difference(p, q, p - q, b, c)
    return _imbalance(*primals), sum_of_tangents(
        tangents[:3],
        lambda dp: mul0(_log_p_over_m(p, q, b, c) - mul0(relative, b), dp),
        lambda dq: mul0(-_log_p_over_m(q, p, c, b) - mul0(relative, c), dq),
        lambda db: mul0(-(p - q) * relative, db),
    )


_imbalance.defjvp(_imbalance_rule, symbolic_zeros=True)


def times(g, db):
    """g · dβ, where dβ is one number for all rows."""
    return mul0(g, db * jnp.ones_like(g))
