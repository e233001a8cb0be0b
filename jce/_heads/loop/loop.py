"""Computes any function of tokens chunk by chunk: results per token, or weighted sums and their gradient in one loop.

The gradient of results per token can't be computed before the cotangents of the tokens are known, so each chunk is
recomputed then. In a sum, the cotangent of a token is its weight, which is known. So the gradient of a chunk can be
computed while its logits exist: the JVP rule of `weighted_sums` computes value and gradient in one loop, whatever the
function is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.arguments.effects import require_differentiable
from jce._heads.inputs import OF_CLASSES, Inputs, expanded, first_of
from jce._heads.loop.chunk_rule import Chunks, chunks_of
from jce._heads.loop.chunks import each_token, over_chunks
from jce._heads.loop.merged_batches import with_merged_batches
from jce._heads.loop.unhoisted import unhoisted
from jce._jax.layout import mesh_names, over_devices
from jce._jax.platforms import Platform, on_platform
from jce._jax.restricted import is_zero, jvp_of_some, live_jvp, not_zero, replaced
from jce._jax.varying import varying
from jce._numerics.mul0 import mul0


class Loop(NamedTuple):
    """The per-chunk function of a loop, and the size of its chunks.

    JAX's caches keep it, so it holds no array and no tracer. Arrays that a function closes over are in `Inputs.shared`.
    """

    of_chunk: Callable  # (platform, inputs of a chunk) -> arrays whose first axis is that of the chunk's tokens
    logits: jax.ShapeDtypeStruct  # of one token, with the classes of all heads counted together
    chunk_size: int | None  # the caller's choice, or None for the platform's rule
    filled: bool  # whether each chunk is padded to this size, even if there are fewer tokens
    class_axis: Hashable | None
    trained: int | None  # the index of the result that is differentiated, if the loop also computes the gradient
    skips: bool  # whether tokens may be masked
    takes_padding: bool  # whether `of_chunk` is finite, with finite derivatives, at padding of zeros
    halved: bool  # whether a chunk's logits are stored in half the bytes (bfloat16), on platforms that can do so
    refused: str  # names of effects of `of_chunk` that prevent a derivative

    @property
    def sums_in_loop(self) -> bool:
        """Whether the loop itself sums the results, and computes the gradient of the sum too."""
        return self.trained is not None

    def results(self, inputs: Inputs) -> list[Array]:
        """The result r of each token, or wr if there are weights. Or Σ wr, if the loop sums."""

        def per_token(*parts):
            inputs = Inputs(*parts)
            results = token_results(self, self._unweighted(_without_nans(inputs) if self.skips else inputs))
            return results if inputs.weights is None else [weighted(r, inputs.weights) for r in results]

        def sums(*parts):
            inputs = Inputs(*parts)
            return weighted_sums(self, inputs.weights, self._unweighted(inputs))

        whole = inputs.heads, inputs.shared
        return with_merged_batches(per_token, inputs.tokens, whole, sums=sums if self.sums_in_loop else None)

    def _unweighted(self, inputs: Inputs) -> Inputs:
        inputs = inputs._replace(weights=None)
        return inputs if self.takes_padding else _with_first(inputs, self.skips)

    def kept(self, inputs: Inputs) -> Array | None:
        return inputs.kept if self.skips else None

    def chunks(self, platform: Platform) -> Chunks:
        return chunks_of(platform, self.chunk_size, self.filled, self.logits, self.halved)

    def on_each_platform(self, on: Callable, *arguments):
        """on(platform, *arguments) for the platform for which the program is lowered. Platforms with the same chunk
        size share a trace."""
        return on_platform(on, lambda platform: self.chunks(platform).size, *arguments)


def _with_first(inputs: Inputs, skips: bool) -> Inputs:
    """The inputs, with the arguments of the first kept token in `shared.first`. If no token is kept, these arguments
    are arbitrary, so heads and shared arrays get no derivative."""
    kept, at = inputs.kept, jnp.argmax(inputs.kept) if skips else 0
    first = tuple([first_of(x, at) for x in arrays] for arrays in (inputs.hidden, inputs.others))
    if skips:
        any_kept = kept.any()

        # A closed-over x that varies over fewer mesh axes than the tokens stays as it is: the select would make it vary
        # over all of them.
        def still(x):
            return jnp.where(any_kept, x, lax.stop_gradient(x)) if varying(any_kept) <= varying(x) else x

        heads, shared = jax.tree.map(still, (inputs.heads, inputs.shared))
        inputs = inputs._replace(heads=heads, shared=shared)
    return inputs.sharing(first=first)


def _without_nans(inputs: Inputs) -> Inputs:
    """The inputs, with 0 in the arrays of masked tokens. For results per token, reverse mode saves the arguments of the
    function, and jax_debug_nans would report a NaN in them."""

    def cleaned(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.where(expanded(inputs.kept, x), x, jnp.zeros_like(x))

    hidden, others = jax.tree.map(cleaned, (inputs.hidden, inputs.others))
    return inputs._replace(hidden=hidden, others=others)


def _unhoisted(inputs: Inputs, *others) -> Inputs:
    return inputs.with_tokens(unhoisted(inputs.tokens, inputs.heads, inputs.shared, others))


# Until JAX 0.12: our own custom_jvp (`_numerics/calculus.py`) keeps all residuals of a loop, which are the logits of
# all tokens. So here and below, JAX's custom_jvp is used.
def _value_apart(static: int) -> Callable:
    """A decorator for function(loop, *static, *arrays), where `static` counts the loop and the other static arguments.
    When the function is differentiated, one call computes the value and another the derivative. If one loop computed
    both, reverse-over-reverse mode would drop the checkpoint and keep the logits of all tokens."""

    def decorated(function):
        value = functools.partial(jax.custom_jvp, nondiff_argnums=tuple(range(static)))(function)

        @functools.partial(value.defjvp, symbolic_zeros=True)
        def _rule(*arguments):
            *given, primals, tangents = arguments
            require_differentiable(given[0].refused)
            return value(*given, *primals), live_jvp(functools.partial(function, *given), primals, tangents)[1]

        return value

    return decorated


@_value_apart(static=1)
def token_results(loop: Loop, inputs: Inputs) -> list[Array]:
    """The results per token: arrays [N, ...]."""
    return loop.on_each_platform(functools.partial(_results_on, loop), _unhoisted(inputs))


def _results_on(loop, platform, inputs):
    def of_chunk(*tokens):
        return loop.of_chunk(platform, inputs.with_tokens(tokens))

    return each_token(of_chunk, loop.chunks(platform), *inputs.tokens, kept=loop.kept(inputs))


def weighted(result, w):
    return mul0(result.astype(w.dtype), jnp.broadcast_to(expanded(w, result), result.shape))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def weighted_sums(loop: Loop, w: Array, inputs: Inputs) -> list[Array]:
    """Σ wr over tokens, for each result r. Only result number `loop.trained`, a number per token, has a derivative with
    respect to the inputs."""
    return [weighted(r, w).sum(0) for r in token_results(loop, inputs)]


# d Σ wr = Σ w ∂r · d(inputs) + Σ r dw
def _weighted_sums_rule(loop, primals, tangents):
    (w, inputs), (dw, dinputs) = primals, tangents
    leaves, structure = jax.tree.flatten(inputs)
    steps = jax.tree.leaves(dinputs, is_leaf=is_zero)
    of_classes = [name in OF_CLASSES for name, x in inputs._asdict().items() for _ in jax.tree.leaves(x)]
    live = not_zero(steps)
    in_loop = tuple(i for i in live if _sums_its_own_gradient(loop, w, inputs, leaves[i]))
    results, gradients = _results_and_gradients(loop, in_loop, w, inputs)
    parts, terms = [], [] if is_zero(dw) else [weighted(results[loop.trained], dw).sum()]
    if apart := [i for i in live if i not in in_loop]:

        def weighted_sum(*leaves):
            return weighted(token_results(loop, structure.unflatten(leaves))[loop.trained], w).sum()

        terms.append(jvp_of_some(weighted_sum, leaves, apart, [steps[i] for i in apart])[1])
    for i, gradient in zip(in_loop, gradients, strict=True):
        gradient, step = (x.astype(w.dtype) for x in (gradient, steps[i]))  # both may be bfloat16
        (parts if of_classes[i] else terms).append(mul0(gradient, step).sum())
    if parts:
        terms.append(over_devices(functools.reduce(jnp.add, parts), mesh_names(loop.class_axis)))
    sums = [weighted(r, w).sum(0) for r in results]
    tangent = [jnp.zeros_like(s) if is_zero(dw) else weighted(r, dw).sum(0) for r, s in zip(results, sums, strict=True)]
    tangent[loop.trained] = functools.reduce(jnp.add, terms)
    return sums, tangent


weighted_sums.defjvp(_weighted_sums_rule, symbolic_zeros=True)


def _sums_its_own_gradient(loop: Loop, w: Array, inputs: Inputs, x: Array) -> bool:
    """Whether the loop may compute the gradient with respect to x. It may if, by the types, `jax.vjp` in the loop sums
    this gradient only over the device's own tokens and classes. Otherwise `jax.vjp` would sum it over devices too, and
    each device would then add the sum of all devices. Such a gradient takes another pass over the tokens."""
    classes = frozenset(mesh_names(loop.class_axis))
    typed = all(classes <= varying(x) for x in jax.tree.leaves(inputs.heads))  # False under check_vma=False: no types
    return typed and varying(w) <= varying(x)


@_value_apart(static=2)
def _results_and_gradients(loop, live, w, inputs):
    """All results, and the gradients of the trained result's weighted sum with respect to the leaves `live` of the
    inputs."""
    return loop.on_each_platform(functools.partial(_summed, loop, live), w, _unhoisted(inputs, w))


def _summed(loop, live, platform, w, inputs):
    """`_results_and_gradients` on one platform."""
    count = len(jax.tree.leaves(inputs.tokens))
    of_tokens = sum(i < count for i in live)  # gradients of the other leaves are summed over chunks
    # Without the checkpoint, the derivative of this loop would keep the logits of all chunks.
    of_chunk = jax.checkpoint(functools.partial(_chunk_and_gradients, loop, live, platform), prevent_cse=False)

    def step(sums, chunk):
        w, tokens = chunk
        results, gradients = of_chunk(w, inputs.with_tokens(tokens))
        by_token, parts = gradients[:of_tokens], list(gradients[of_tokens:])
        return parts if sums is None else jax.tree.map(jnp.add, sums, parts), (results, by_token)

    leaves = jax.tree.leaves(inputs)
    zeros = [jnp.zeros_like(leaves[i]) for i in live[of_tokens:]]
    tokens = w, inputs.tokens
    sums, (results, by_token) = over_chunks(step, loop.chunks(platform), zeros, tokens, loop.kept(inputs))
    return results, [*by_token, *sums]


def _chunk_and_gradients(loop, live, platform, w, inputs):
    """The results of a chunk, and the gradients of the trained result's weighted sum."""
    leaves, structure = jax.tree.flatten(inputs)

    def weighted_sum(*values):
        results = loop.of_chunk(platform, structure.unflatten(replaced(leaves, live, values)))
        return weighted(results[loop.trained], w).sum(), results

    value, pull_back, results = jax.vjp(weighted_sum, *(leaves[i] for i in live), has_aux=True)
    return results, pull_back(jnp.ones_like(value))
