"""The loss of a label, from hidden states and head, and its derivatives, with few passes over logits and few matmuls.

The derivative with respect to the logits u (before the soft cap) is an array ∂ℓ/∂u, in which the label's entry is minus
the sum of all others. Here it is kept as a product r e, with a number r per token. The matrix e, without r, is
multiplied with hidden states and head. This has three advantages:

- No pass divides e by Z.
- In bfloat16 matmuls, the label's entry isn't rounded.
- The matmul with the head doesn't wait for the cotangents of the tokens, so one loop can sum value and gradient.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.loss.label_excess import (
    Excess,
    LabelLoss,
    Target,
    excess_of_logits,
    excess_of_product,
    one_reading,
)
from jce._heads.loss.logits import Logits, capped
from jce._heads.loss.products import Products
from jce._heads.loss.temperature import at_temperature, whole_log_sum
from jce._jax.platforms import named
from jce._jax.restricted import is_zero, live_jvp
from jce._jax.waiting import Program, waiting
from jce._numerics.mul0 import mul0, over
from jce._quantities.label_loss import label_loss
from jce._quantities.soft_targets import scaled_square
from jce._softmax.softmax import logsumexp


def losses_of(loss: LabelLoss, target: Target, x: Logits | Array) -> Array:
    """The loss of each token, for `Logits` or for an array of logits."""
    if isinstance(x, Array):  # from a head that is a function
        return _of_logits(loss, target, x)
    return _loss(target, x.hidden, x.head, x.soft_cap, loss, x.products)


def _of_logits(loss: LabelLoss, target: Target, of_head: Array) -> Array:
    """The loss at an array of logits."""
    (y, t, _), classes = target, loss.classes
    x = at_temperature(of_head, t, classes)
    smoothing, z_loss = (None if a is None else jnp.asarray(a, x.dtype) for a in loss.numbers(target, x.dtype))
    if t is None or z_loss is None:
        return label_loss(y, x, smoothing, None, z_loss, classes)
    log_sum = whole_log_sum(logsumexp(x, classes), of_head, t, classes)
    return label_loss(y, x, smoothing, None, None, classes) + scaled_square(z_loss, log_sum)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _loss(target, hidden, head, soft_cap, loss: LabelLoss, products: Products):
    if products.narrow:  # never on a CPU
        return waiting(Program(_of_product, (loss, products)), target, hidden, head, soft_cap)
    return _of_logits(loss, target, Logits(hidden, head, soft_cap, products).whole())


def _of_product(loss, products, platform, target, hidden, head, soft_cap) -> Array:
    x = Logits(hidden, head, soft_cap, products)
    reading = one_reading(loss, platform, target, x) if named(platform).fuses_operands else None
    return _of_logits(loss, target, x.whole()) if reading is None else reading.losses()


# dℓ = r (e · du), where du = W dh + dW h + db. Tangents of traced numbers, temperatures and the soft cap are rare, and
# take another pass.
def _loss_rule(loss, products, primals, tangents):
    target, h, head, soft_cap = primals
    d_target, dh, d_head, d_cap = tangents
    losses, e, r = _loss_and_excess(target, h, head, soft_cap, loss, products)
    parts, r = [], lax.stop_gradient(r)  # its tangent is 0, and as an array of zeros it would cost a matmul
    h, rest = h.astype(e.dtype), r
    if head.weight.shape[0] < head.weight.shape[1] and not products.narrow:
        # e is smaller than h, so r multiplies e here. The remaining factor, `rest`, is 1, or NaN if r is NaN. Because
        # of mul0, such a NaN contributes 0 for tokens whose cotangent is 0.
        e, rest = mul0(jnp.broadcast_to(r[:, None], e.shape), e), 1 + (r - r)
    if not is_zero(dh):
        pull = products.with_head(e, head, 0)
        parts.append(mul0(rest, mul0(pull, dh.astype(e.dtype)).sum(-1)))
    if not is_zero(d_head.wide):  # the transpose is eᵀ · (r h)
        if loss.may_be_greedy:
            of_head = mul0(e, products.dot(h, d_head.wide, 1, 1, e.dtype)).sum(-1)
        else:
            of_head = (h * products.dot(e, d_head.wide, 1, 0, e.dtype)).sum(-1)
        parts.append(mul0(rest, of_head))
    if not is_zero(d_head.bias):
        parts.append(mul0(rest, mul0(e, jnp.broadcast_to(d_head.bias, e.shape)).sum(-1)))
    # Each device has the terms of its own classes.
    terms = [loss.classes.over_devices(functools.reduce(jnp.add, parts))] if parts else []
    if not all(is_zero(t) for t in jax.tree.leaves((d_target[1:], d_cap))):

        def along_numbers(target, soft_cap):
            return _of_logits(loss, target, Logits(h, head, soft_cap, products).whole())

        terms.append(live_jvp(along_numbers, (target, soft_cap), (d_target, d_cap))[1])
    return losses, functools.reduce(jnp.add, terms)


_loss.defjvp(_loss_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _loss_and_excess(target, hidden, head, soft_cap, loss, products) -> Excess:
    return waiting(Program(excess_of_product, (loss, products)), target, hidden, head, soft_cap)


# The derivative is that of the excess as a function of an array of logits.
def _loss_and_excess_rule(loss, products, primals, tangents):
    def of_logits(target, hidden, head, soft_cap):
        return _excess_of_logits(target, Logits(hidden, head, None, products).uncapped(), soft_cap, loss)

    return live_jvp(of_logits, primals, tangents)


_loss_and_excess.defjvp(_loss_and_excess_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _excess_of_logits(target, u, soft_cap, loss) -> Excess:
    return waiting(Program(excess_of_logits, (loss,)), target, u, soft_cap)


# The derivative of r e is taken from another expression for r e: the gradient of `_of_logits`, whose own derivative is
# accurate. Here r counts as constant, so de = d(r e)/r.
def _excess_of_logits_rule(loss, primals, tangents):
    def twin(target, u, soft_cap):
        losses, pull_back = jax.vjp(lambda u: _of_logits(loss, target, capped(u, soft_cap)), u)
        return losses, *pull_back(jnp.ones_like(losses))

    losses, e, r = _excess_of_logits(*primals, loss)
    d_losses, d_excess = live_jvp(twin, primals, tangents)[1]
    de = over(d_excess, jnp.broadcast_to(r[:, None], e.shape))
    return Excess(losses, e, r), Excess(d_losses, de, jnp.zeros_like(r))


_excess_of_logits.defjvp(_excess_of_logits_rule, symbolic_zeros=True)
