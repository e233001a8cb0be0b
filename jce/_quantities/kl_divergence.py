"""KL(p‖q) = Σ pᵢ log pᵢ/qᵢ, and a generalized form for numbers that don't sum to 1, Σ (pᵢ log pᵢ/qᵢ - pᵢ + qᵢ)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.public import public
from jce._jax.rows import distributions
from jce._numerics.calculus import (
    both_zero,
    custom_jvp,
    def_partials,
    def_partials_of_sum,
    def_tangents,
    def_twin,
    over_if_present,
    ratio,
)
from jce._numerics.deviance import deviance, log_ratio
from jce._numerics.elementary import raised, unless_negative
from jce._softmax.kernel import kernel


@public("axis")
def kl_divergence(p: ArrayLike, q: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """The Kullback-Leibler divergence KL(p‖q) of a target p and a model q, in nats.

    KL(p‖q) = Σᵢ pᵢ log pᵢ/qᵢ

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
      >>> print(jce.kl_divergence(p, q), jce.cross_entropy(p, q) - jce.entropy(p), jce.kl_divergence(q, p))
      0.3465736 0.3465736 inf

    KL(p‖q) = H(p, q) - H(p) ≥ 0, and it is 0 only at p = q. It is not symmetric.

    The result is the sum over the numbers as they are stored, within a few ulps even if p ≈ q. Because of rounding, the
    sums Σ pᵢ and Σ qᵢ of stored distributions are not exactly 1. If Σ pᵢ < Σ qᵢ, the exact sum over the stored numbers
    may be as low as Σ pᵢ - Σ qᵢ, and then the result is negative too. `generalized_kl_divergence` and
    `binary_kl_divergence` are never negative.

    Args:
      p: real, [..., n, ...], the target's probabilities of n classes along `axis`.
      q: real, [..., n, ...], the model's probabilities. Batch axes broadcast, the class axis doesn't.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to p and q. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or q is.

    At the boundary:
      A class with pᵢ = 0 < qᵢ contributes 0, with ∂KL/∂qᵢ = 0 and ∂KL/∂pᵢ = -∞, the one-sided limit. A class with
      pᵢ > 0 = qᵢ makes KL = +∞, with ∂KL/∂qᵢ = -∞ and ∂KL/∂pᵢ = +∞. A class with pᵢ = qᵢ = 0 is absent: it contributes
      0, and both derivatives are 0.

    Derivative:
      ∂KL/∂pᵢ = log pᵢ/qᵢ + 1, ∂KL/∂qᵢ = -pᵢ/qᵢ, each in its argument's dtype.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit.

    Not checked:
      Σ pᵢ = Σ qᵢ = 1 (see `check_distribution`). If p ≈ q, and rounding left Σ pᵢ 1e-7 below Σ qᵢ, KL is about -1e-7.
      For p ≈ q, use `kl_divergence_with_logits`, or `generalized_kl_divergence`, whose derivative with respect to q is
      1 - pᵢ/qᵢ. A negative pᵢ or qᵢ gives NaN, from its logarithm.

    Source:
      S. Kullback and R. A. Leibler, On Information and Sufficiency (1951).

    See "Arguments", "Excluded classes" and "Conventions" in jce/README.md.
    """
    (p, q), classes = distributions("kl_divergence", axis, where, p=p, q=q)
    return _kl(p, q, classes)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def _kl(p, q, backend):
    # KL is Σ (p log p/q - p + q) + Σ (p - q). Where q is far above p, p log p/q would be lost in the rounding of p - q.
    # So where q > 4p, both sums use -3p instead of p - q. This number is max(p - q, -3p) in the first sum, and the
    # equal p - min(q, 4p) in the second. It is continuous at q = 4p, so passes that see p and q rounded differently
    # agree. The sums write it in two forms, since XLA would store a shared array.
    deviances = unless_negative(jnp.minimum(p, q), deviance(p, q, p - q, jnp.maximum(p - q, -3 * p)))
    return backend.sum_with_differences(deviances, p, jnp.minimum(q, 4 * p))


# ∂/∂p p log p/q = log p/q + 1, ∂/∂q p log p/q = -p/q
def_partials_of_sum(
    _kl,
    lambda p, q, _: jnp.where(both_zero(p, q), jnp.zeros_like(p), _log_ratio(p, q) + 1),
    lambda p, q, _: -ratio(p, q),
)


@public("axis")
def generalized_kl_divergence(p: ArrayLike, q: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """The KL divergence of non-negative numbers that need not sum to 1, in nats.

    Σᵢ (pᵢ log pᵢ/qᵢ - pᵢ + qᵢ)

    Example:
      >>> print(jce.generalized_kl_divergence([1.0, 0.0], [2.0, 3.0]))
      3.3068528

    Rounding never makes it negative, for any non-negative floats. It is 0 only if p = q or if it underflows. If
    Σ pᵢ = Σ qᵢ, it is KL(p‖q). It is not symmetric.

    Args:
      p: real, [..., n, ...], the target's weights of n classes along `axis`.
      q: real, [..., n, ...], the model's weights. Batch axes broadcast, the class axis doesn't.
      axis: the axis of the n classes: a static int, counted in the broadcast shape.
      where: bool, broadcast to p and q. False excludes a class, even if it is NaN or infinite. To mask rows, pass
        `jnp.expand_dims(mask, axis)`: a masked row gives 0.

    Returns:
      [..., ...], the broadcast shape without `axis`; float32, or float64 if p or q is.

    At the boundary:
      A class with pᵢ = 0 < qᵢ contributes qᵢ, with ∂/∂qᵢ = 1 and ∂/∂pᵢ = -∞, the one-sided limit. A class with
      pᵢ > 0 = qᵢ makes the result +∞, with ∂/∂qᵢ = -∞ and ∂/∂pᵢ = +∞. A class with pᵢ = qᵢ = 0 contributes 0, with
      ∂/∂qᵢ = 1 and ∂/∂pᵢ = 0.

    Derivative:
      ∂/∂pᵢ = log pᵢ/qᵢ, ∂/∂qᵢ = (qᵢ - pᵢ)/qᵢ, each in its argument's dtype. Their relative error is small even if
      p ≈ q.

    Raises:
      TypeError: an argument is not real, or `where` not boolean.
      ValueError: shapes, `axis` or `where` don't fit.

    Not checked:
      pᵢ, qᵢ ≥ 0. A negative pᵢ or qᵢ gives NaN, from its logarithm.

    Source:
      D. D. Lee and H. S. Seung, Algorithms for Non-negative Matrix Factorization (2000), where it is called
      "divergence".

    See "Arguments", "Excluded classes" and "Conventions" in jce/README.md.
    """
    (p, q), classes = distributions("generalized_kl_divergence", axis, where, p=p, q=q)
    return classes.sum(_deviance(p, q))


@custom_jvp
def _deviance(p, q):
    return unless_negative(jnp.minimum(p, q), deviance(p, q, p - q))


# ∂/∂p (p log p/q - p + q) = log p/q, ∂/∂q (p log p/q - p + q) = (q - p)/q
def_partials(_deviance, lambda p, q: _log_ratio(p, q), lambda p, q: _relative_excess(p, q))


@custom_jvp
def _log_ratio(p, q):
    p, q = raised(p, q)
    return unless_negative(jnp.minimum(p, q), log_ratio(p, q, p - q))


# ∂/∂p log p/q = 1/p, ∂/∂q log p/q = -1/q
def_tangents(_log_ratio, lambda t, p, q: over_if_present(t, q, p), lambda t, p, q: -over_if_present(t, p, q))


@custom_jvp
def _relative_excess(p, q):
    p, q = raised(p, q)
    return unless_negative(q, jnp.where(both_zero(p, q), jnp.ones_like(q), (q - p) / jnp.abs(q)))


# (q - p)/q = 1 - p/q
def_twin(_relative_excess, lambda p, q: -ratio(p, q))
