"""The label's cross-entropy at logits = hidden · headᵀ, without the logits of all tokens, at three matrix products.

While a chunk's logits x are there, so is ∂ℓ/∂x, and with it ∂ℓ/∂h = ∂ℓ/∂x · W and the chunk's part of the head's
gradient, (∂ℓ/∂x)ᵀ h. The rule of a sum of losses therefore computes value and gradient in one loop. A loss for each
token has to wait for its cotangent, and computes x again: a fourth product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jce._arguments import choice, fraction, is_array, positive, require_no_tail
from jce._calculus import live_jvp
from jce._classes import Classes
from jce._elementary import exp, log1p
from jce._heads.chunks import (
    REDUCTIONS,
    Logits,
    checked,
    checked_chunk,
    each_token,
    over_chunks,
    shares,
    tokens_and_head,
)
from jce._heads.linear import Linear
from jce._heads.over_tokens import TokenOptions
from jce._heads.places import Arguments, on_each_device
from jce._heads.products import Head
from jce._heads.sparse_targets import Numbers, linear_sparse_cross_entropy
from jce._heads.temperature import at_temperature, whole_log_sum
from jce._heads.together import together
from jce._heads.tokens import of_tokens
from jce._label_surprisal import label_surprisal, smoothed_surprisal
from jce._layout import over_devices
from jce._mul0 import mul0, over
from jce._platforms import Chunks, ChunkSize, Platform, named, on_platform
from jce._public import public
from jce._soft_targets import scaled_square, smoothed
from jce._softmax import logsumexp, surprisal, surprisal_at_label
from jce._waiting import waiting
from jce._ways.kernel import way_of

OPTIONS, NUMBERS = (
    ("reduction", "chunk_size", "batch_invariant", "precision"),
    ("label_smoothing", "z_loss", "temperature", "logit_soft_cap"),
)


@public(*OPTIONS, "tail", "axis_name", numbers=NUMBERS)
def linear_cross_entropy(
    labels: ArrayLike,
    hidden: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    label_probs: ArrayLike | None = None,
    tail: bool = False,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    precision: Any = None,
    axis_name: Hashable | None = None,
) -> Array:
    """log 1/q_y at q = softmax(x), x = hidden · headᵀ + bias, in nats, of many tokens: a head and its loss in one.

    What `cross_entropy_with_integer_labels` is of x, but x never exists for more than a chunk of tokens, in any
    derivative of any order. Loss and gradient of a mean or a sum cost three matrix products of the size of x's own, a
    loss for each token four. With label_smoothing ε and z_loss ζ a token's loss is
    (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζ (log Σ exp xᵢ)².

    Args:
      labels: integer, [...], class indices y: the shape of hidden without its last axis; with label_probs [..., k].
      hidden: real, [..., d], a state for each token.
      head: real, [n, d], a row for each class: the layout of an embedding table. Of a Dense layer of flax it is
        kernel.T; where n = d, the wrong layout can't be seen.
      bias: real, [n]. A class with bias -∞ is forbidden: it has probability 0.
      label_probs: real, [..., k], the shape of labels, or None: probabilities p of k labels a token, as of a teacher
        whose likeliest classes are kept. As in `cross_entropy_with_integer_labels`, as is `tail`.
      tail: whether all classes without a label count as one more outcome, of what is left of the target: a static bool.
      weights: real, broadcasts to the token axes: w, each token's weight. A mean divides by Σ w: advantages,
        which may sum to 0, would then train nothing, silently, so give them reduction="sum" and divide by a count.
      where: bool, broadcasts to the token axes. A token where it is False takes no part, whatever it holds, and
        costs no product in any derivative: those that are kept are put together, and only their chunks are computed.
        So it is of a weight of 0 where nobody differentiates the weights.
      reduction: "mean" for Σ wℓ / Σ w, "sum" for Σ wℓ, "none" for wℓ, a number for each token. Without weights w is 1,
        and 0 where `where` is False; if Σ w = 0, the mean is 0.
      label_smoothing: ε, a number from 0 to 1. Python's 0 costs nothing. A traced number, as of a schedule, isn't
        checked, in this and the next two.
      z_loss: ζ, a number ≥ 0. Python's 0 costs nothing.
      temperature: T > 0: x is then divided by T, everywhere above, after bias and soft cap. A number, or real, an array
        of one for each token, which broadcasts to the token axes; as in `linear_log_probs`.
      logit_soft_cap: c > 0, a number: x is then c tanh((hidden · headᵀ + bias)/c), everywhere above. None: none.
      chunk_size: the number of tokens in a chunk, a static int. None for a rule: max(512, 2²³/n) on a CPU, whose
        float32 logits fill 32 MiB or more, and max(2048, 2²⁶/n) on an accelerator, 256 MiB or more, so that multiplying
        hides the reading of the head and the sum of its gradient. Of float64 logits half of 2²³ and 2²⁶. Fewer need
        less memory; where all tokens are one chunk, none is saved. Of a mesh with Auto axes that `jax.set_mesh` has
        set, times its number of devices, over which XLA may split the tokens.
      batch_invariant: whether a token's result, and its hidden state's gradient, have the same bits alone and among any
        others, however many: a static bool. Each chunk is then filled up to chunk_size, which must be given, so that a
        token alone costs as much as a chunk. It isn't so of the gradient of what tokens share, a sum over them, nor of
        a mean's.
      precision: of the matrix products, as in `jax.lax.dot_general`. None for JAX's setting. Where that is none either,
        an accelerator rounds each token's derivative in the logits to bfloat16, if hidden and head both are, scaled so
        that the label's entry is exact; "default", as any other, keeps it in float32.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which head and bias are split; labels
        are still of all n classes, and the result is the same on all its devices. Under `check_vma=False` differentiate
        outside of the `shard_map`: inside, a gradient is wrong without an error, as plain JAX's of a `psum` is. None
        for whole arrays: under Explicit axes of a mesh, where their types say how they are split, each device has its
        part, and under Auto axes `sharded_linear_cross_entropy` sees to it.

    Returns:
      A number, or [...] for "none"; float32, or float64 if hidden, head, bias, weights or label_probs is. Beyond
      arguments and results it needs a few arrays of chunk × n, in reverse mode one or two of the head's shape, and some
      of [..., d]. Products of bfloat16 or float16 arrays are accumulated in float32, and so is the sum of the head's
      gradient over the chunks; derivatives in the logits are float32, but as `precision` says.

    At the boundary:
      A label outside [0, n) makes its token NaN, in value and gradient, and with it a mean or a sum: mask such labels,
      as with where=labels >= 0. At a weight of 0 the derivative in the weight is ℓ as at any other, but a token of
      weight 0 with a label outside [0, n) or a hidden state that isn't finite is left out as by `where`. A forbidden
      class has the derivative below at qᵢ = 0, and 0 under a soft cap. At the label it makes the loss +∞, and with
      label smoothing, which counts every class, every loss +∞: better slice off what pads the vocabulary, head[:n]. A
      traced 0 is none, and costs nothing there.
      No tokens make a mean or a sum of 0, no classes make every loss 0.

    Derivative:
      ∂ℓ/∂xᵢ = qᵢ - (1-ε) [i = y] - ε/n + 2ζ qᵢ log Σ exp x, and on to hidden, head, bias and weights, each in its own
      dtype: argnums 1, 2 and 3 for `jax.grad`. In a traced number and in temperatures too, by another pass. Forward and
      reverse mode, any order.

    Raises:
      TypeError: labels are not integers, hidden, head, bias, weights or temperature not real, or `where` not boolean.
      ValueError: shapes disagree, or an option is none of those above.

    Not checked:
      Values. Results below the smallest normal number are 0 where XLA flushes them, as it does on a CPU.

    Example:
      >>> labels, hidden, head = jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> print(jce.linear_cross_entropy(labels, hidden, head))
      4.1223074e-09
    """
    name = "linear_cross_entropy"
    if label_probs is not None:
        linear = Linear(hidden, head, bias, logit_soft_cap)
        options = TokenOptions(where, weights, reduction, chunk_size, precision, axis_name, batch_invariant)
        numbers = Numbers(label_smoothing, z_loss, temperature)
        return linear_sparse_cross_entropy(name, labels, label_probs, linear, tail, numbers, options)
    require_no_tail(name, tail)
    got = checked(name, labels, hidden, head, temperature=temperature, bias=bias, weights=weights, where=where)
    chunk = checked_chunk(name, chunk_size, batch_invariant)
    loss = loss_of_part(name, reduction, label_smoothing, z_loss, logit_soft_cap, chunk, precision)
    return on_each_device(name, loss, got["labels"].shape, in_parts(got), axis_name, whole=reduction != "none")


def in_parts(got: Mapping[str, Array]) -> Arguments:
    rows = {name: x for name, x in got.items() if name in ("head", "bias")}
    return Arguments({name: x for name, x in got.items() if name not in rows}, rows)


def loss_of_part(
    name: str, reduction, label_smoothing, z_loss, logit_soft_cap, chunk, precision
) -> Callable[[Arguments, tuple, Hashable | None], Array]:
    """The loss of checked arguments that are a device's part, split over these mesh axes of tokens and of classes."""
    reduction = choice(name, reduction=reduction, choices=REDUCTIONS)

    def loss(arguments, token_axes, class_axis):
        got, classes = arguments.tokens | arguments.rows, Classes(-1, class_axis)
        tokens, head = tokens_and_head(name, got, classes)
        options = checked_options(name, classes, head, label_smoothing, z_loss, logit_soft_cap, chunk, precision)
        if reduction == "none":
            return of_tokens(_weighted_losses, tokens, (head, options)).reshape(got["labels"].shape)
        if reduction == "mean":
            tokens = tokens._replace(weights=shares(tokens.weights, token_axes))
        return over_devices(of_tokens(_weighted_losses, tokens, (head, options), total=_weighted_sum), token_axes)

    return loss


class Options(NamedTuple):
    """All else that a token's loss depends on. As a tree, its leaves are the numbers that are traced."""

    logits: Logits
    classes: Classes
    chunk: ChunkSize
    smoothing: float | Array
    z_loss: float | Array

    def on(self, platform: Platform, h: Array, head: Head) -> tuple[Options, Chunks]:
        logits = self.logits._replace(products=self.logits.products.on(platform, h, head.weight))
        o = self._replace(logits=logits, classes=way_of(self.classes, platform, head.bias))
        return o, platform.chunks(self.chunk, head.bias)

    def numbers(self):
        return self.logits.soft_cap, self.smoothing, self.z_loss

    def with_numbers(self, soft_cap, smoothing, z_loss) -> Options:
        return self._replace(logits=self.logits._replace(soft_cap=soft_cap), smoothing=smoothing, z_loss=z_loss)


def _flatten(o: Options):
    traced = tuple(is_array(x) or isinstance(x, SymbolicZero) for x in o.numbers())
    static = (None if t else x for x, t in zip(o.numbers(), traced, strict=True))
    return tuple(itertools.compress(o.numbers(), traced)), (o.with_numbers(*static), traced)


def _unflatten(static, leaves) -> Options:
    (o, traced), leaf = static, iter(leaves)
    return o.with_numbers(*(next(leaf) if t else x for x, t in zip(o.numbers(), traced, strict=True)))


jax.tree_util.register_pytree_node(Options, _flatten, _unflatten)


def checked_options(
    name: str, classes: Classes, head: Head, label_smoothing, z_loss, logit_soft_cap, chunk, precision
) -> Options:
    dtype = head.bias.dtype
    return Options(
        Logits.checked(name, head, logit_soft_cap, precision),
        classes,
        chunk,
        fraction(name, dtype, label_smoothing=label_smoothing),
        positive(name, dtype, z_loss=z_loss, or_zero=True),
    )


def _some(number) -> bool:
    """Whether a number is there: Python's 0 isn't."""
    return is_array(number) or number != 0


# JAX's own custom_jvp, here and below: ours would keep the residuals of a loop, which are the logits of all tokens.
@jax.custom_jvp
def _losses(y, h, kept, head, o):
    return _losses_in_a_loop(y, h, kept, head, o)


# The plain derivative, but the value from another call: of one loop for both, reverse mode over reverse mode forgets
# the checkpoint, and would keep the logits of all tokens.
def _losses_rule(primals, tangents):
    return _losses(*primals), live_jvp(_losses_in_a_loop, primals, tangents)[1]


_losses.defjvp(_losses_rule, symbolic_zeros=True)


def _losses_in_a_loop(y, h, kept, head, o):
    def losses(platform, y, h, kept, head, o):
        o, chunks = o.on(platform, h, head)
        return each_token(lambda y, h: _loss(y, o.logits.of(h, head), o), chunks, y, h, kept=kept)

    return on_platform(losses, *together((y, h), head, o), kept, head, o)


def _loss(target, x, o):
    """Of tokens' labels [C] and logits [C, n]."""
    y, t, of_head = target.labels, target.temperature(), o.classes.fold(x)
    x = at_temperature(of_head, t, o.classes)
    if is_array(o.smoothing):
        share = jnp.asarray(1 / o.classes.count(x), x.dtype)
        loss = smoothed_surprisal(y, share, x, o.smoothing, o.classes)
    else:
        loss = label_surprisal(y, x, o.classes)
    if not is_array(o.smoothing) and o.smoothing:
        loss = smoothed(loss, o.classes.sum(surprisal(x, o.classes)) / o.classes.count(x), o.smoothing)
    if _some(o.z_loss):
        loss += scaled_square(o.z_loss, whole_log_sum(logsumexp(x, o.classes), of_head, t, o.classes))
    return loss


def _weighted_losses(y, h, w, kept, head, o):
    return mul0(_losses(y, h, kept, head, o), w)


@jax.custom_jvp
def _weighted_sum(y, h, w, kept, head, o):
    return _weighted_losses(y, h, w, kept, head, o).sum()


# d Σ wℓ = Σ w (∂ℓ/∂h · dh + ∂ℓ/∂W · dW + ∂ℓ/∂b · db) + Σ ℓ dw, and along numbers and temperatures, rare as it is, by a
# pass more
def _weighted_sum_rule(primals, tangents):
    y, h, w, kept, head, o = primals
    dy, dh, dw, _, dhead, do = tangents
    steps = (dh, dhead.wide, dhead.bias)
    wanted = tuple(not isinstance(t, SymbolicZero) for t in steps)
    losses, gradients = _losses_and_gradients(y, h, w, kept, head, o, wanted)
    # Each device has its own classes' part of each gradient.
    parts = [mul0(g, t.astype(g.dtype)).sum() for g, t in zip(gradients, steps, strict=True) if g is not None]
    terms = [o.classes.over_devices(functools.reduce(jnp.add, parts))] if parts else []
    if not isinstance(dw, SymbolicZero):
        terms.append(mul0(losses, dw).sum())
    if not all(isinstance(t, SymbolicZero) for t in jax.tree.leaves((dy.temperatures, do))):

        def along_numbers(t, o):
            return _weighted_losses(y._replace(temperatures=t), h, w, kept, head, o).sum()

        terms.append(live_jvp(along_numbers, (y.temperatures, o), (dy.temperatures, do))[1])
    return mul0(losses, w).sum(), functools.reduce(jnp.add, terms)


_weighted_sum.defjvp(_weighted_sum_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def _losses_and_gradients(y, h, w, kept, head, o, wanted):
    """ℓ, and Σ wℓ's derivatives in h, W and b, or None for those that aren't wanted."""
    return _loop(y, h, w, kept, head, o, wanted, _unnormalized_excess)


# The derivative of another expression for the excess, whose own derivative is accurate; and the value as above.
def _losses_and_gradients_rule(wanted, primals, tangents):
    def twin(y, h, w, kept, head, o):
        return _loop(y, h, w, kept, head, o, wanted, _excess)

    return _losses_and_gradients(*primals, wanted), live_jvp(twin, primals, tangents)[1]


_losses_and_gradients.defjvp(_losses_and_gradients_rule, symbolic_zeros=True)


def _loop(y, h, w, kept, head, o, wanted, excess: Callable):
    y, h = together((y, h), head, w, o)
    return waiting(_Loop(wanted, excess), y, h, w, kept, head, o)


@dataclasses.dataclass(frozen=True)
class _Loop:
    wanted: tuple[bool, bool, bool]
    excess: Callable

    def __call__(self, platform, y, h, w, kept, head, o):
        return _loop_on(self.wanted, self.excess, named(platform), y, h, w, kept, head, o)


def _loop_on(wanted, excess, platform, y, h, w, kept, head, o):
    in_h, in_weight, in_bias = wanted
    o, chunks = o.on(platform, h, head)
    products = o.logits.products
    # Where r is multiplied with least; but e is rounded before, if it is.
    fewer_classes = head.weight.shape[0] < head.weight.shape[1] and not products.narrow

    @functools.partial(jax.checkpoint, prevent_cse=False)  # with no chunk's logits kept, whatever is differentiated
    def step(sums, chunk):
        y, h, w = chunk
        losses, e, r = excess(y, o.logits.uncapped(h, head), w, o)
        e, r = (r[:, None] * e, 1) if fewer_classes else (e, r[:, None])
        sum_weight, sum_bias = sums or (None, None)
        if in_bias:
            sum_bias = plus(sum_bias, (r * e).sum(0))
        if in_weight:
            sum_weight = plus(sum_weight, products.dot(e, r * h.astype(e.dtype), 0, 0, e.dtype))
        return (sum_weight, sum_bias), (losses, r * products.with_head(e, head, 0) if in_h else None)

    zeros = jnp.zeros_like(head.wide) if in_weight else None, jnp.zeros_like(head.bias) if in_bias else None
    sums, (losses, by_token) = over_chunks(step, chunks, zeros, (y, h, w), kept)
    return losses, (by_token, *sums)


def plus(total: Array | None, part: Array) -> Array:
    return part if total is None else total + part


def _excess(target, u, w, o):
    """ℓ, e [C, n] and r [C] with w ∂ℓ/∂u = r e, of the logits before the cap."""
    losses, pull_back = jax.vjp(lambda u: _loss(target, o.logits.capped(u), o), u)
    return losses, *pull_back(w), jnp.ones_like(w)


def _unnormalized_excess(target, u, w, o):
    """The same numbers in fewer passes over them: with r = w/ZT, e is exp(x - m), but for the label's.

    q_y - 1 = -s/Z; so Z ∂ℓ/∂x_y = -s + ε (Z - Z/n) + 2ζ e_y log Σ exp x, and elsewhere eᵢ (1 + 2ζ log Σ exp x) - ε Z/n.
    Where e may be rounded, it is divided by s, so that the label's entry is exactly -1 and cancels as the sum does.
    """
    column = o.classes.column
    y, t, of_head = target.labels, target.temperature(), o.classes.fold(o.logits.capped(u))
    x = at_temperature(of_head, t, o.classes)
    n = o.classes.count(x)
    off = o.classes.off_label(y, x)
    m, s, d = off
    e, e_y = exp(x - column(m)), exp(-d)
    z, log_z = s + e_y, log1p(s - (1 - e_y))
    losses, at_label = surprisal_at_label(off), -s
    if _some(o.smoothing):
        losses = smoothed(losses, log_z + o.classes.sum(column(m) - x) / n, o.smoothing)
        at_label += o.smoothing * (z - z / n)
    if _some(o.z_loss):
        log_sum = whole_log_sum(m + log_z, of_head, t, o.classes)
        losses += scaled_square(o.z_loss, log_sum)
        at_label += 2 * o.z_loss * log_sum * e_y
        e *= column(1 + 2 * o.z_loss * log_sum)
    if _some(o.smoothing):
        e -= column(o.smoothing * (z / n))
    if o.classes.masks:
        others = jnp.maximum(s, jnp.finfo(s.dtype).tiny)
        e, at_label, z = e * column(1 / others), at_label / others, z / others
    e = o.classes.put(o.classes.unfold(e), o.classes.local(y, x), at_label)
    if t is not None:
        z *= jnp.where(t == 0, jnp.ones_like(t), t)
        # At a temperature of 0 the derivative is ±∞ where it isn't 0.
        e = jnp.where((t == 0)[:, None], over(e, jnp.zeros_like(e)), e)
    if o.logits.soft_cap is not None:
        e *= o.logits.slope(u)
    return losses, e, w / z
