"""Cross-entropy of soft targets p and logits x: H(p, q) = Σ pᵢ log 1/qᵢ at q = softmax(x)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jce._arguments import is_array
from jce._calculus import custom_jvp, def_partials_of_sum
from jce._elementary import exp
from jce._mul0 import mul0
from jce._platforms import per_platform, per_platform_apart
from jce._softmax import another, complement, normalizer, softmax, softmax_tangent, surprisal


def bound(p, sign, classes):
    """A number at p = 0, and ±∞ at any normal p: what is within that may be multiplied with p, and 0 · ∞ is 0. A select
    would make XLA write the N × n factors of a sum to memory on a CPU."""
    info = jnp.finfo(p.dtype)
    if classes.are_few(p):
        return sign * jnp.abs((p * info.max) * classes.lowest(p))
    return sign * info.max * (0.5 + jnp.abs(p) * (1.5 / info.tiny))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform
def soft(p, x, classes):
    return classes.sum(p * jnp.minimum(normalizer(x, classes).surprisal(x, classes), bound(p, 1, classes)))


# ∂H/∂pᵢ = log 1/qᵢ, ∂H/∂xᵢ = qᵢ Σp - pᵢ
def_partials_of_sum(soft, lambda p, x, classes: surprisal(x, classes), lambda p, x, classes: soft_excess(p, x, classes))


@functools.partial(custom_jvp, nondiff_argnums=(2,))
@per_platform_apart
def soft_excess(p, x, classes):
    n = normalizer(x, classes)
    total = classes.sum(p)
    d = x - classes.column(another(n.m, n.s, few=classes.masks))
    # Of a class that dominates q = 1 - s/Z, and Σp - p is exact.
    dominant = (classes.column(total) - p) - classes.column(total * (n.s / n.z))
    return jnp.where(d > classes.column(n.shared - 0.5), dominant, exp(d) * classes.column(total / n.z) - p)


def _excess_rule(classes, primals, tangents):
    (p, x), (dp, dx) = primals, tangents
    terms = []
    if not isinstance(dp, SymbolicZero):
        q = softmax(x, classes)
        d_total = classes.each(classes.sum(dp), p)
        # For a class of q > 1/2, q Σdp - dp is the sum of the other dp, less (1 - q) Σdp.
        others = classes.column(classes.sum(jnp.where(q > 0.5, jnp.zeros_like(dp), dp)))
        terms.append(jnp.where(q > 0.5, others - mul0(complement(x, classes), d_total), mul0(q, d_total) - dp))
    if not isinstance(dx, SymbolicZero):
        terms.append(softmax_tangent(dx, x, classes.sum(p), classes))
    return soft_excess(p, x, classes), functools.reduce(jnp.add, terms)


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
