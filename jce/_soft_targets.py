"""Cross-entropy of soft targets p and logits x: H(p, q) = Σ pᵢ log 1/qᵢ at q = softmax(x)."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jce._arguments import is_array
from jce._calculus import along, custom_jvp, def_partials_of_sum
from jce._elementary import exp
from jce._mul0 import mul0
from jce._softmax import complement, softmax, softmax_tangent, surprisal
from jce._ways.kernel import kernel, kernel_apart


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel
def soft(p, x, classes):
    return classes.sum(p * jnp.minimum(classes.normalizer(x).surprisal(x, classes), classes.bound(p, 1)))


# ∂H/∂pᵢ = log 1/qᵢ, ∂H/∂xᵢ = qᵢ Σp - pᵢ
def_partials_of_sum(soft, lambda p, x, classes: surprisal(x, classes), lambda p, x, classes: soft_excess(p, x, classes))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@kernel_apart
def soft_excess(p, x, classes):
    n = classes.normalizer(x)
    total = classes.sum(p)
    d = x - classes.column(classes.again(n.m, n.s))
    # Of a class that dominates q = 1 - s/Z, and Σp - p is exact.
    dominant = (classes.column(total) - p) - classes.column(total * (n.s / n.z))
    return jnp.where(n.dominates(d, classes), dominant, exp(d) * classes.column(total / n.z) - p)


def _excess_rule(classes, primals, tangents):
    p, x = primals

    def along_p(dp):
        q = softmax(x, classes)
        d_total = classes.each(classes.sum(dp), p)
        # For a class of q > 1/2, q Σdp - dp is the sum of the other dp, less (1 - q) Σdp.
        others = classes.column(classes.sum(jnp.where(q > 0.5, jnp.zeros_like(dp), dp)))
        return jnp.where(q > 0.5, others - mul0(complement(x, classes), d_total), mul0(q, d_total) - dp)

    tangent = along(tangents, along_p, lambda dx: softmax_tangent(dx, x, classes.sum(p), classes))
    return soft_excess(p, x, classes), tangent


soft_excess.defjvp(_excess_rule, symbolic_zeros=True)


def smoothed(loss, uniform_loss, smoothing):
    if is_array(smoothing):
        both = scaled(1 - smoothing, loss) + scaled(smoothing, uniform_loss)
        return jnp.where(jnp.isnan(loss), loss, both)  # also at ε = 1
    if smoothing == 1:  # the label counts for nothing, even where its loss is +∞, but it still must be one
        return jnp.where(jnp.isnan(loss), loss, uniform_loss)
    return (1 - smoothing) * loss + smoothing * uniform_loss


def scaled(number, x):
    """The number times x, and 0 for a traced 0, whatever x is; Python's 0 costs nothing at all, so isn't asked here."""
    return mul0(x, number * jnp.ones_like(x)) if is_array(number) else number * x
