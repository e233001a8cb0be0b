"""The cross-entropy of soft targets p and logits x: H(p, q) = Σ pᵢ log 1/qᵢ with q = softmax(x)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jce._jax.arguments import is_array
from jce._numerics.calculus import custom_jvp, def_at_once, sum_of_tangents
from jce._numerics.mul0 import mul0
from jce._softmax.kernel import kernel
from jce._softmax.softmax import complement, softmax, softmax_tangent, surprisal


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def soft(p, x, backend):
    n = backend.normalizer(x)
    return backend.sum(surprisal_terms(p, n.log_z, backend.depth(x, n), backend))


# ∂H/∂pᵢ = log 1/qᵢ, ∂H/∂xᵢ = qᵢ Σp - pᵢ
def _soft_rule(classes, primals, tangents):
    h, *partials = _soft_and_partials(*primals, classes)
    return h, classes.sum(sum_of_tangents(tangents, *(lambda t, f=f: mul0(f, t) for f in partials)))


soft.defjvp(_soft_rule, symbolic_zeros=True)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def _soft_and_partials(p, x, backend):
    # One kernel computes all three results, since they share the exponentials.
    of_x = backend.exponentials(x)
    n = of_x.of_row
    depth = backend.depth(x, n)
    h = backend.sum(surprisal_terms(p, n.log_z, depth, backend))
    return h, backend.column(n.log_z) - depth, _excess(p, of_x, backend)


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def soft_excess(p, x, backend):
    return _excess(p, backend.exponentials(x), backend)


def surprisal_terms(p, of_row, depth, classes):
    """p (of_row - depth), and 0 where p = 0 even if the depth is -∞. `of_row` is a number per row, which must be NaN if
    the row has a NaN."""
    return p * (classes.column(of_row) - jnp.maximum(depth, classes.lower_bound(p)))


def _excess(p, of_x, backend):
    (e, _, n), total = of_x, backend.sum(p)
    # The comparison below finds the class that dominates (`softmax.py`). This class has q = 1 - s/Z, so its q Σp - p is
    # (Σp - p) - Σp s/Z, in which Σp - p is exact.
    dominant = (backend.column(total) - p) - backend.column(total * (n.s / n.z))
    return jnp.where(e > backend.column(0.6 + n.undominated), dominant, e * backend.column(total / n.z) - p)


def _excess_rule(classes, primals, tangents):
    p, x = primals

    def along_p(dp):
        q = softmax(x, classes)
        d_total = classes.broadcast(classes.sum(dp), p)
        # For a class with q > 1/2, q Σdp - dp would cancel, so it is computed as the sum of the other dp, minus
        # (1 - q) Σdp.
        others = classes.column(classes.sum(jnp.where(q > 0.5, jnp.zeros_like(dp), dp)))
        return jnp.where(q > 0.5, others - mul0(complement(x, classes), d_total), mul0(q, d_total) - dp)

    tangent = sum_of_tangents(tangents, along_p, lambda dx: softmax_tangent(dx, x, classes.sum(p), classes))
    return soft_excess(p, x, classes), tangent


soft_excess.defjvp(_excess_rule, symbolic_zeros=True)
def_at_once(_soft_and_partials, soft, lambda p, x, classes: surprisal(x, classes), soft_excess)


def smoothed(loss, uniform_loss, smoothing):
    """(1-ε) loss + ε uniform_loss. Where `loss` is NaN, the result is NaN at every ε."""
    if is_array(smoothing):
        both = scaled(1 - smoothing, loss) + scaled(smoothing, uniform_loss)
        return jnp.where(jnp.isnan(loss), loss, both)  # a NaN loss stays NaN also at ε = 1
    if smoothing == 1:  # 0 times a loss of +∞ would be NaN, but a NaN loss (from a label out of range) must stay
        return jnp.where(jnp.isnan(loss), loss, uniform_loss)
    return (1 - smoothing) * loss + smoothing * uniform_loss


@jax.custom_jvp
def smoothed_by(loss, uniform_loss, difference, smoothing):
    """`smoothed`. The derivative with respect to a traced ε is `difference`, a more accurate uniform_loss - loss."""
    return smoothed(loss, uniform_loss, smoothing)


@smoothed_by.defjvp
def _smoothed_by_rule(primals, tangents):
    loss, _, difference, smoothing = primals
    d_loss, d_uniform_loss, _, d_smoothing = tangents
    difference = jnp.where(jnp.isnan(loss), loss, difference)
    in_losses = scaled(1 - smoothing, d_loss) + scaled(smoothing, d_uniform_loss)
    return smoothed_by(*primals), in_losses + mul0(difference, d_smoothing * jnp.ones_like(difference))


def scaled(number, x):
    """number · x, and 0 for a traced 0 even if x is infinite. Callers skip a Python 0, so it isn't tested here."""
    return mul0(x, number * jnp.ones_like(x)) if is_array(number) else number * x


def scaled_square(number, x):
    """number · x², and 0 for a traced 0. x² is never formed, since it may overflow where the product doesn't."""
    return mul0(x, scaled(number, x)) if is_array(number) else number * x * x
