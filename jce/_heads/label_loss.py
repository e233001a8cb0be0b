"""A label's loss at logits that aren't multiplied out yet: value, and derivatives of the fewest passes and products.

Whoever differentiates a loss of logits x gets ∂ℓ/∂x, N × n numbers, in which the label's entry is a sum of all others.
Here it is r e instead: e, a matrix that meets hidden states and head as it is, and r, a number a token. So nothing is
written to divide by Z; where matrices are multiplied as bfloat16 the label's entry isn't rounded; and the product with
the head is done before a token's cotangent is known, so that a loop can sum value and gradient in one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._arguments import is_array
from jce._classes import Classes
from jce._elementary import exp, log1p
from jce._heads.logits import Logits, capped, slope
from jce._heads.products import Products
from jce._heads.temperature import at_temperature, whole_log_sum
from jce._label_surprisal import label_surprisal, smoothed_surprisal
from jce._mul0 import mul0, over
from jce._platforms import named
from jce._primitives import is_zero, live_jvp
from jce._soft_targets import scaled_square, smoothed
from jce._softmax import logsumexp, surprisal, surprisal_at_label
from jce._waiting import waiting
from jce._ways.kernel import way_of


class Target(NamedTuple):
    """Of tokens: labels [C] and temperatures [C], or None where all are 1; and the numbers that are traced."""

    labels: Array
    temperatures: Array | None
    traced: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LabelLoss:
    """(1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζ (log Σ exp xᵢ)², with the numbers that aren't traced: static."""

    classes: Classes
    smoothing: float | None
    z_loss: float | None
    may_be_greedy: bool = False  # of a temperature that may be 0, at which e is ±∞, and yet 0 for a cotangent of 0

    def numbers(self, target: Target, dtype) -> Any:
        """ε and ζ"""
        known = {"smoothing": self.smoothing, "z_loss": self.z_loss} | target.traced
        return tuple(a.astype(dtype) if is_array(a) else a for a in known.values())

    def __call__(self, target: Target, x: Logits) -> Array:
        return _loss(target, x.hidden, x.head, x.soft_cap, self, x.products)


def _some(number) -> bool:
    """Whether a number is there: Python's 0 isn't."""
    return is_array(number) or number != 0


def _of_logits(loss: LabelLoss, target: Target, of_head: Array) -> Array:
    (y, t, _), classes = target, loss.classes
    x = at_temperature(of_head, t, classes)
    smoothing, z_loss = loss.numbers(target, x.dtype)
    if is_array(smoothing):
        share = jnp.asarray(1 / classes.count(x), x.dtype)
        total = smoothed_surprisal(y, share, x, smoothing, classes)
    else:
        total = label_surprisal(y, x, classes)
        if smoothing:
            total = smoothed(total, classes.sum(surprisal(x, classes)) / classes.count(x), smoothing)
    if _some(z_loss):
        total += scaled_square(z_loss, whole_log_sum(logsumexp(x, classes), of_head, t, classes))
    return total


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _loss(target, hidden, head, soft_cap, loss: LabelLoss, products: Products):
    return _of_logits(loss, target, Logits(hidden, head, soft_cap, products).whole())


# dℓ = r (e · dx), of dx = W dh + dW h + db; and along numbers and temperatures, rare as it is, by a pass more
def _loss_rule(loss, products, primals, tangents):
    target, h, head, soft_cap = primals
    d_target, dh, d_head, d_cap = tangents
    logits = Logits(h, head, soft_cap, products)
    losses, e, r = _loss_and_excess(target, logits.uncapped(), soft_cap, loss)
    parts, r = [], lax.stop_gradient(r)  # a constant, as that rule has it: a tangent of zeros would cost a product
    h, r_h = h.astype(e.dtype), r
    if head.weight.shape[0] < head.weight.shape[1] and not products.narrow:  # r is multiplied with the smaller of two
        e, r_h = mul0(jnp.broadcast_to(r[:, None], e.shape), e), 1 + (r - r)  # or NaN
    if not is_zero(dh):
        pull = products.with_head(e, head, 0)
        parts.append(mul0(r_h, mul0(pull, dh.astype(e.dtype)).sum(-1)))
    if not is_zero(d_head.wide):  # its transpose is eᵀ · (r h)
        if loss.may_be_greedy:
            of_head = mul0(e, products.dot(h, d_head.wide, 1, 1, e.dtype)).sum(-1)
        else:
            of_head = (h * products.dot(e, d_head.wide, 1, 0, e.dtype)).sum(-1)
        parts.append(mul0(r_h, of_head))
    if not is_zero(d_head.bias):
        parts.append(mul0(r_h, mul0(e, jnp.broadcast_to(d_head.bias, e.shape)).sum(-1)))
    # Each device has its own classes' part.
    terms = [loss.classes.over_devices(functools.reduce(jnp.add, parts))] if parts else []
    if not all(is_zero(t) for t in jax.tree.leaves((d_target[1:], d_cap))):

        def along_numbers(target, soft_cap):
            return _of_logits(loss, target, Logits(h, head, soft_cap, products).whole())

        terms.append(live_jvp(along_numbers, (target, soft_cap), (d_target, d_cap))[1])
    return losses, functools.reduce(jnp.add, terms)


_loss.defjvp(_loss_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _loss_and_excess(target, u, soft_cap, loss):
    """ℓ, e [C, n] and r [C] with ∂ℓ/∂u = r e, of the logits u before the cap."""
    return waiting(_Excess(loss), target, u, soft_cap)


# That of another expression for r e, whose own derivative is accurate. r is taken for a constant here.
def _loss_and_excess_rule(loss, primals, tangents):
    def twin(target, u, soft_cap):
        losses, pull_back = jax.vjp(lambda u: _of_logits(loss, target, capped(u, soft_cap)), u)
        return losses, *pull_back(jnp.ones_like(losses))

    losses, e, r = _loss_and_excess(*primals, loss)
    d_losses, d_excess = live_jvp(twin, primals, tangents)[1]
    return (losses, e, r), (d_losses, over(d_excess, jnp.broadcast_to(r[:, None], e.shape)), jnp.zeros_like(r))


_loss_and_excess.defjvp(_loss_and_excess_rule, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class _Excess:
    """In the fewest passes over x: with r = 1/ZT, e is exp(x - m), but for the label's.

    q_y - 1 = -s/Z; so Z ∂ℓ/∂x_y = -s + ε (Z - Z/n) + 2ζ e_y log Σ exp x, and elsewhere eᵢ (1 + 2ζ log Σ exp x) - ε Z/n.
    Where e may be rounded, it is divided by s, so that the label's entry is exactly -1 and cancels as the sum does.
    """

    loss: LabelLoss

    def __call__(self, platform, target, u, soft_cap):
        classes = way_of(self.loss.classes, named(platform), u)
        u = classes.stored(u)  # once, though the label is looked up in it
        column, y, t = classes.column, target.labels, target.temperatures
        of_head = classes.fold(capped(u, soft_cap))
        x = at_temperature(of_head, t, classes)
        smoothing, z_loss = self.loss.numbers(target, x.dtype)
        n = classes.count(x)
        off = classes.off_label(y, x)
        m, s, d = off
        e, e_y = exp(x - column(m)), exp(-d)
        z, log_z = s + e_y, log1p(s - (1 - e_y))
        losses, at_label = surprisal_at_label(off), -s
        if _some(smoothing):
            losses = smoothed(losses, log_z + classes.sum(column(m) - x) / n, smoothing)
            at_label += smoothing * (z - z / n)
        if _some(z_loss):
            log_sum = whole_log_sum(m + log_z, of_head, t, classes)
            losses += scaled_square(z_loss, log_sum)
            at_label += 2 * z_loss * log_sum * e_y
            e *= column(1 + 2 * z_loss * log_sum)
        if _some(smoothing):
            e -= column(smoothing * (z / n))
        if classes.masks:
            others = jnp.maximum(s, jnp.finfo(s.dtype).tiny)
            e, at_label, z = e * column(1 / others), at_label / others, z / others
        # NaN is r's alone: where a token's cotangent is 0 the product of e with it has to be.
        number = z <= jnp.finfo(z.dtype).max
        e = jnp.where(column(number), e, jnp.zeros_like(e))
        at_label = jnp.where(number, at_label, jnp.zeros_like(at_label))
        e = classes.put(classes.unfold(e), classes.local(y, x), at_label)
        if t is not None:
            z *= jnp.where(t == 0, jnp.ones_like(t), t)
            # At a temperature of 0 the derivative is ±∞ where it isn't 0.
            e = jnp.where((t == 0)[:, None], over(e, jnp.zeros_like(e)), e)
        if soft_cap is not None:
            e *= slope(u, soft_cap)
        return losses, e, 1 / z
