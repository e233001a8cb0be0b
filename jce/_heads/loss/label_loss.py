"""A label's loss, from hidden states and head: its value, and its derivatives by the fewest passes and products.

The plain derivative of a loss in logits u (before the soft cap) is an array ∂ℓ/∂u, in which the label's entry is minus
the sum of all others.
Here it is a product r e: a number r for each token, and a matrix e, which is multiplied with hidden states and head as
it is. So no pass divides e by Z; where matrices are multiplied as bfloat16, the label's entry isn't rounded; and the
product with the head doesn't wait for a token's cotangent, so that one loop can sum value and gradient.
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
    """The loss of each token; `Logits` aren't multiplied out where that saves a pass."""
    if isinstance(x, Array):  # a head that is a function gives logits multiplied out
        return _of_logits(loss, target, x)
    return _loss(target, x.hidden, x.head, x.soft_cap, loss, x.products)


def _of_logits(loss: LabelLoss, target: Target, of_head: Array) -> Array:
    """The loss at logits."""
    (y, t, _), classes = target, loss.classes
    x = at_temperature(of_head, t, classes)
    smoothing, z_loss = (None if a is None else jnp.asarray(a, x.dtype) for a in loss.numbers(target, x.dtype))
    if t is None or z_loss is None:
        return label_loss(y, x, smoothing, None, z_loss, classes)
    log_sum = whole_log_sum(logsumexp(x, classes), of_head, t, classes)
    return label_loss(y, x, smoothing, None, None, classes) + scaled_square(z_loss, log_sum)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _loss(target, hidden, head, soft_cap, loss: LabelLoss, products: Products):
    if products.narrow:  # which they aren't on a CPU
        return waiting(Program(_of_product, (loss, products)), target, hidden, head, soft_cap)
    return _of_logits(loss, target, Logits(hidden, head, soft_cap, products).whole())


def _of_product(loss, products, platform, target, hidden, head, soft_cap) -> Array:
    x = Logits(hidden, head, soft_cap, products)
    reading = one_reading(loss, platform, target, x) if named(platform).fuses_operands else None
    return _of_logits(loss, target, x.whole()) if reading is None else reading.losses()


# dℓ = r (e · du), where du = W dh + dW h + db. Tangents of numbers, temperatures and the soft cap, which are rare, take
# another pass.
def _loss_rule(loss, products, primals, tangents):
    target, h, head, soft_cap = primals
    d_target, dh, d_head, d_cap = tangents
    losses, e, r = _loss_and_excess(target, h, head, soft_cap, loss, products)
    parts, r = [], lax.stop_gradient(r)  # constant: a tangent of zeros would cost a product
    h, rest = h.astype(e.dtype), r
    if head.weight.shape[0] < head.weight.shape[1] and not products.narrow:
        # e is smaller than h, so r multiplies e. What is left of r is 1, or NaN where r is: by mul0 such a NaN stays
        # out of tokens whose cotangent is 0.
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
    # Each device has the part of its own classes.
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


# The derivative is that of the excess as a function of logits that are multiplied out.
def _loss_and_excess_rule(loss, products, primals, tangents):
    def of_logits(target, hidden, head, soft_cap):
        return _excess_of_logits(target, Logits(hidden, head, None, products).uncapped(), soft_cap, loss)

    return live_jvp(of_logits, primals, tangents)


_loss_and_excess.defjvp(_loss_and_excess_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _excess_of_logits(target, u, soft_cap, loss) -> Excess:
    return waiting(Program(excess_of_logits, (loss,)), target, u, soft_cap)


# The derivative of r e comes from another expression for it, the gradient of `_of_logits`, whose own derivative is
# accurate. r is taken as constant here, so de = d(r e)/r.
def _excess_of_logits_rule(loss, primals, tangents):
    def twin(target, u, soft_cap):
        losses, pull_back = jax.vjp(lambda u: _of_logits(loss, target, capped(u, soft_cap)), u)
        return losses, *pull_back(jnp.ones_like(losses))

    losses, e, r = _excess_of_logits(*primals, loss)
    d_losses, d_excess = live_jvp(twin, primals, tangents)[1]
    de = over(d_excess, jnp.broadcast_to(r[:, None], e.shape))
    return Excess(losses, e, r), Excess(d_losses, de, jnp.zeros_like(r))


_excess_of_logits.defjvp(_excess_of_logits_rule, symbolic_zeros=True)
