"""An estimate of KL(p‖q) from outcomes sampled from p: q/p - 1 - log q/p for each outcome, from log-probabilities.

With δ = log q/p the estimate is e^δ - 1 - δ. Evaluated as written, its terms cancel if p ≈ q, which is the usual case
in training: at δ = 1e-6 the value is 5e-13, but float32 gives -6e-8. So for |δ| < 3/2 it is computed as the series
δ²/2! + δ³/3! + …, in which nothing cancels. For larger |δ|, the rounding of δ (half an ulp) would make e^δ wrong by up
to |δ| ulps. So e^δ is multiplied by 1 + r, where r is the rounding error of δ = log q - log p.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.public import public
from jce._jax.rows import elementwise
from jce._numerics.calculus import custom_jvp, def_partials
from jce._numerics.elementary import exp, exponential_minus_1, exponential_tail, two_sum


@public()
def sampled_kl_divergence(log_p: ArrayLike, log_q: ArrayLike) -> Array:
    """An estimate of KL(p‖q) from each outcome that was sampled from p, in nats.

    q/p - 1 - log q/p

    Example:
      >>> print(jce.sampled_kl_divergence(-2.0, jnp.array([-2.0, -2.000001, -3.0])))
      [0.0000000e+00 4.5474722e-13 3.6787945e-01]

    The mean over outcomes that were sampled from p (the first argument) is an unbiased estimate of KL(p‖q). Rounding
    never makes a value negative, and a value is 0 only if p = q or if it underflows. In reinforcement learning this is
    the estimator k3: the penalty KL(policy‖reference) is `sampled_kl_divergence(policy, reference)` at tokens that the
    policy sampled. The estimator k1 is log p/q, and k2 is `jnp.square(log_p - log_q) / 2`.

    Args:
      log_p: real, any shape, log-probabilities under p of outcomes that were sampled from p. Shapes broadcast.
      log_q: real, log-probabilities of the same outcomes under q.

    Returns:
      The broadcast shape; float32, or float64 if log_p or log_q is.

    At the boundary:
      If only q is 0, the value is +∞, with ∂/∂log_p = 1 and ∂/∂log_q = -1. If only p is 0, or if q/p overflows, the
      value and the derivatives below are infinite. If both are 0, the value is 0, with first derivatives 0. If you
      multiply a value of +∞ by an importance ratio of 0, you get NaN, as in plain JAX. NaN gives NaN.

    Derivative:
      ∂/∂log_p = 1 - q/p, ∂/∂log_q = q/p - 1, each in its argument's dtype. Their relative error is small even if p ≈ q.
      In expectation over outcomes sampled from p, the gradient with respect to the parameters of q is ∇KL(p‖q). The
      gradient with respect to the parameters of p (a policy in training) is not ∇KL(p‖q) but ∇KL(q‖p): it ignores that
      the samples depend on these parameters. To get ∇KL(p‖q), multiply the value by
      exp(log_p - jax.lax.stop_gradient(log_p)), or by an importance ratio p/p_old that is differentiated in p.

    Raises:
      TypeError: an argument is not real.
      ValueError: the shapes don't broadcast.

    Not checked:
      Values. (Log-densities may be above 0.) If q/p is unbounded, so is the variance: an outcome that is far likelier
      under q than under p outweighs all others. The rounding of bfloat16 and float16 log-probabilities is larger
      than a policy's change in one step, so pass float32, which `linear_log_probs` returns.

    Source:
      J. Schulman, Approximating KL Divergence (2020), http://joschu.net/blog/kl-approx.html.

    See "Conventions" in jce/README.md.
    """
    log_p, log_q = elementwise("sampled_kl_divergence", log_p=log_p, log_q=log_q)
    return _divergence(log_p, log_q)


@custom_jvp
def _divergence(a, b):
    d = _log_ratio(a, b)
    far = _exponential(a, b) - 1 - jnp.minimum(d, jnp.finfo(d.dtype).max)  # at d = ∞, ∞ - ∞ would be NaN
    return jnp.where(jnp.abs(d) < 1.5, exponential_tail(d), far)


# ∂/∂log p (q/p - 1 - log q/p) = 1 - q/p, ∂/∂log q = q/p - 1
def_partials(_divergence, lambda a, b: -_relative_excess(a, b), lambda a, b: _relative_excess(a, b))


@custom_jvp
def _relative_excess(a, b):
    d = _log_ratio(a, b)
    return jnp.where(jnp.abs(d) < 1.5, exponential_minus_1(d), _exponential(a, b) - 1)


# ∂/∂log p (q/p - 1) = -q/p, ∂/∂log q = q/p
def_partials(_relative_excess, lambda a, b: -_quotient(a, b), lambda a, b: _quotient(a, b))


@custom_jvp
def _quotient(a, b):
    return _exponential(a, b)


# ∂/∂log p q/p = -q/p, ∂/∂log q = q/p
def_partials(_quotient, lambda a, b: -_quotient(a, b), lambda a, b: _quotient(a, b))


def _log_ratio(a, b):
    """log q/p, and 0 where a = b: if both are infinite, their difference would be NaN."""
    return jnp.where(a == b, jnp.zeros_like(a), b - a)


def _exponential(a, b):
    """q/p, corrected by the rounding error of log q - log p. If one of them is infinite, that error is NaN and is not
    used."""
    lost = two_sum(b, -a)[1]
    return exp(_log_ratio(a, b)) * jnp.where(jnp.abs(lost) < 0.5, 1 + lost, jnp.ones_like(lost))
