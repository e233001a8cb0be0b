"""softmax(x), log 1/softmax(x) and their derivatives, within a few ulps even if one class dominates.

With m = max x and eᵢ = exp(xᵢ - m), the normalizer is Z = Σ eᵢ = 1 + s. Here s is the off-maximum sum: the sum over all
classes except one maximal class. If another logit is 40 below the maximum, s = 4e-18 is accurate, while Z rounds to 1.
So

    log 1/qᵢ = (m - xᵢ) + log(1 + s)        1 - qᵢ = (s + (1 - eᵢ)) / Z

stay accurate too. A class with logit -∞ has probability 0. A row with a NaN, a +∞ or only -∞ is NaN.

If x is computed in the same program, each pass may see it rounded differently (`_jax/rows.py` says why). Then xᵢ - m at
the maximum may differ from 0 by some ulps of m, so no formula tests for x = m. Instead there are two cases:

- If Z < 3/2, one class dominates: its q is 1/Z > 2/3. Up to rounding, its xᵢ - m is 0 and its eᵢ is 1. All other
  classes have eᵢ ≤ s < 1/2 and xᵢ - m < log 1/2 = -0.69. So a threshold such as eᵢ > 0.6 or xᵢ - m > -0.5 finds the
  class that dominates. Its xᵢ - m is then set to 0, and its eᵢ to 1.
- If Z ≥ 3/2, no class dominates. Then s = Z - 1, and nothing cancels. Each formula has the form log Z - (xᵢ - m) or
  eᵢ/Z, in which m drops out, however it is rounded. Up to rounding, all eᵢ ≤ 1 and all xᵢ - m ≤ 0. So if the thresholds
  are raised by 1 or more, no class is above them: formulas add `Normalizer.undominated`, which is 0 in the first case
  and ≥ 1 in the second.

How the sums are computed depends on the platform: a kernel is called with the backend of its platform (`backend.py`).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from jce._numerics.calculus import custom_jvp, ratio
from jce._numerics.elementary import exp, log1p
from jce._numerics.mul0 import mul0
from jce._softmax.backend import Backend
from jce._softmax.kernel import kernel
from jce._softmax.sums import OffLabel


def surprisal_at_label(off: OffLabel) -> Array:
    """log 1/q_y = log(1 + s e^d) = d + log(e^-d + s)."""
    _, s, d = off
    # With d = near + rest, the loss is rest + log1p(s e^near - (1 - e^-rest)). For a label near the maximum (d ≤ 1),
    # near = d. So the loss is log1p(s e^d), and the rounding of x and m adds only relative errors. If s < 1/2, near = d
    # too. Otherwise s + e^-d might be tiny, and the argument of log1p would cancel to nearly -1. If s < 1/2, d < 16
    # (`known_label.py`), so e^d doesn't overflow.
    near = jnp.where(s < 0.5, d, jnp.minimum(d, 1))
    rest = d - near
    return rest + log1p(s * exp(near) - (1 - exp(-rest)))


# softmax and its logarithm, as differentiable functions of x


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def softmax(x: Array, backend: Backend) -> Array:
    """qᵢ = eᵢ/Z."""
    e, z, _ = backend.exponentials(x)
    return e / backend.column(z)


@softmax.defjvp
def _softmax_rule(classes, primals, tangents):
    return softmax(*primals, classes), softmax_tangent(tangents[0], primals[0], None, classes)


# dqᵢ = qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@kernel
def softmax_tangent(t: Array, x: Array, scale: Array | None, backend: Backend) -> Array:
    """dqᵢ along t, times `scale`, a number per row, if it is given."""
    e, z, u, *_ = backend.deviation(t, x)
    q = e * backend.column(ratio(jnp.ones_like(z) if scale is None else scale, z))
    return unless_nan(z, mul0(q, u), t, backend)


@kernel
def centered(t: Array, x: Array, backend: Backend) -> Array:
    """tᵢ - Σⱼ qⱼtⱼ, linear in t."""
    _, z, u, *_ = backend.deviation(t, x)
    return unless_nan(z, u, t, backend)


def unless_nan(z, tangent, t, backend):
    """The tangent. In a row with a NaN, the result is NaN where t ≠ 0, but 0 where t = 0. Without this function the
    whole tangent of such a row would be NaN, because the sums over the row are NaN."""
    zero = lax.stop_gradient(backend.column(z - z))  # or NaN; jax_debug_nans would stop at a constant NaN
    nan = mul0(jnp.broadcast_to(zero, t.shape), t)
    number = z <= jnp.finfo(z.dtype).max  # z ≥ 1 or NaN; with isfinite XLA wouldn't fuse the chain of `chain.py`
    return jnp.where(backend.column(number), tangent, nan)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def complement(x: Array, backend: Backend) -> Array:
    """1 - qᵢ = (s + (1 - eᵢ))/Z."""
    n = backend.exponentials(x).of_row
    return (backend.column(n.s) + (1 - exp(backend.depth(x, n)))) / backend.column(n.z)


# d(1 - qᵢ) = -qᵢ (tᵢ - Σⱼ qⱼtⱼ)
@complement.defjvp
def _complement_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return complement(x, classes), -softmax_tangent(t, x, None, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def surprisal(x: Array, backend: Backend) -> Array:
    """log 1/qᵢ = log Z - (xᵢ - m) ≥ 0, and +∞ at a class of probability 0."""
    return backend.exponentials(x).of_row.surprisal(x, backend)


# d log 1/qᵢ = -(tᵢ - Σⱼ qⱼtⱼ)
@surprisal.defjvp
def _surprisal_rule(classes, primals, tangents):
    (x,), (t,) = primals, tangents
    return surprisal(x, classes), -centered(t, x, classes)


@functools.partial(custom_jvp, nondiff_argnums=(1,))
@kernel
def logsumexp(x: Array, backend: Backend) -> Array:
    """log Σ exp xᵢ = m + log(1 + s)."""
    n = backend.for_log_sum(x).normalizer(x)
    return n.m + n.log_z


# d log Σ exp xᵢ = Σ qᵢtᵢ
@logsumexp.defjvp
def _logsumexp_rule(classes, primals, tangents):
    return logsumexp(*primals, classes), _mean(*tangents, *primals, classes)


@kernel
def _mean(t, x, backend):
    _, z, _, mean, _ = backend.deviation(t, x)
    # The result is `mean`, not the sum of softmax(x) t. If passes round x differently, the qᵢ in that sum don't add up
    # to 1, but the qᵢ in `mean` do, to the last digit.
    nan = backend.sum(mul0(jnp.broadcast_to(backend.column(lax.stop_gradient(z - z)), t.shape), t))
    return jnp.where(jnp.isfinite(z), mean, nan)
