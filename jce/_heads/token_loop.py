"""Computes any function of tokens chunk by chunk: a result for each token, or weighted sums and their gradient at once.

With a result for each token, a derivative needs the tokens' cotangents first, and then recomputes each chunk. In a sum
each token's cotangent is its weight, which is known, so a chunk's gradient can be computed while its logits exist: the
rule of `weighted_sums` computes value and gradient in one loop, whatever the function is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jce._heads.called import Called
from jce._heads.chunks import each_token, over_chunks
from jce._heads.effects import require_differentiable
from jce._heads.products import Head
from jce._heads.unhoisted import unhoisted
from jce._jax.layout import mesh_names, over_devices
from jce._jax.platforms import Chunks, ChunkSize, Platform, on_platform
from jce._jax.restricted import is_zero, jvp_of_some, live_jvp, replaced
from jce._jax.varying import vary_over, varying
from jce._numerics.mul0 import mul0


class Inputs(NamedTuple):
    """The tokens' hidden states, [N, d] each, and other arrays, [N, ...] each; a head for each array of hidden states;
    and a tree of arrays that all tokens share."""

    hidden: Sequence[Array]
    tokens: Sequence[Array]
    heads: Sequence[Head | Called]
    shared: Any

    def varying_over(self, axes: frozenset, class_axis: Hashable | None) -> Inputs:
        """The inputs, marked as varying over these mesh axes, since the type of a loop's carry can't change. Hidden
        states and heads vary over the classes' axes too, the others don't.

        As they are marked before the loop, gradients are summed over devices once, after it.
        """
        classes = frozenset(mesh_names(class_axis))

        def vary(tree, axes):
            leaves, structure = jax.tree.flatten(tree)
            return jax.tree.unflatten(structure, vary_over(axes, *leaves))

        hidden, heads = vary((self.hidden, self.heads), axes | classes)
        tokens, shared = vary((self.tokens, self.shared), axes - classes)
        return Inputs(hidden, tokens, heads, shared)

    def unhoisted(self, *others) -> Inputs:
        hidden, tokens = unhoisted((self.hidden, self.tokens), self.heads, self.shared, others)
        return self._replace(hidden=hidden, tokens=tokens)


class Loop(NamedTuple):
    """What a loop computes of each chunk, and how large a chunk is: static."""

    of_chunk: Callable  # (platform, inputs of a chunk) -> arrays whose first axis is that of the chunk's tokens
    chunk: ChunkSize
    logits: jax.ShapeDtypeStruct  # of one token, under all heads
    class_axis: Hashable | None
    trained: int = 0  # the number of the result that has a derivative where results are summed
    some: bool = False  # whether tokens may be left out, so that inputs.tokens[0] says which are kept
    halved: bool = False  # whether a chunk's logits are stored in half the bytes, on a platform that can
    refused: str = ""  # the names of effects of `of_chunk` with which it can't be differentiated

    def kept(self, inputs: Inputs) -> Array | None:
        return inputs.tokens[0] if self.some else None

    def chunks(self, platform: Platform) -> Chunks:
        return platform.chunks(self.chunk, self.logits, self.halved)

    def on_each_platform(self, on: Callable, *arguments):
        """on(platform, *arguments) for the platform that it is lowered for; traced once for those with chunks of the
        same size."""
        return on_platform(on, lambda platform: self.chunks(platform).size, *arguments)


# Until JAX 0.12: JAX's own custom_jvp, here and below. Ours (`calculus.py`) saves all residuals there, which of a loop
# are the logits of all tokens.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def token_results(loop: Loop, inputs: Inputs) -> list[Array]:
    """The results of all tokens, arrays [N, ...]."""
    return _token_results(loop, inputs)


# The plain derivative, but the value comes from another call. If one loop gave both, reverse-over-reverse mode would
# drop the checkpoint and keep the logits of all tokens.
def _token_results_rule(loop, primals, tangents):
    require_differentiable(loop.refused)
    return token_results(loop, *primals), live_jvp(functools.partial(_token_results, loop), primals, tangents)[1]


token_results.defjvp(_token_results_rule, symbolic_zeros=True)


def _token_results(loop, inputs):
    return loop.on_each_platform(functools.partial(_results_on, loop), inputs.unhoisted())


def _results_on(loop, platform, inputs):
    def of_chunk(hidden, tokens):
        return loop.of_chunk(platform, inputs._replace(hidden=hidden, tokens=tokens))

    return each_token(of_chunk, loop.chunks(platform), inputs.hidden, inputs.tokens, kept=loop.kept(inputs))


def weighted(result, w):
    column = jnp.expand_dims(w, range(1, result.ndim))
    return mul0(result.astype(w.dtype), jnp.broadcast_to(column, result.shape))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def weighted_sums(loop: Loop, w: Array, inputs: Inputs) -> list[Array]:
    """Σ wr over tokens, for each result r. In the inputs, only result number `loop.trained`, a number per token, has a
    derivative."""
    return [weighted(r, w).sum(0) for r in token_results(loop, inputs)]


# d Σ wr = Σ w ∂r · d(inputs) + Σ r dw
def _weighted_sums_rule(loop, primals, tangents):
    (w, inputs), (dw, dinputs) = primals, tangents
    leaves, structure = jax.tree.flatten(inputs)
    steps = jax.tree.leaves(dinputs, is_leaf=is_zero)
    # For each leaf, whether a device's gradient is only its classes' part of it: in hidden states and heads.
    of_classes = jax.tree.leaves(Inputs(*(jax.tree.map(lambda _, k=k: k in (0, 2), x) for k, x in enumerate(inputs))))
    classes = frozenset(mesh_names(loop.class_axis))
    typed = all(classes <= varying(x) for x in jax.tree.leaves(inputs.heads))  # False under check_vma=False: no types
    live, others = [], []
    for i, (x, t) in enumerate(zip(leaves, steps, strict=True)):
        if not is_zero(t):
            (live if typed and varying(w) <= varying(x) else others).append(i)
    results, gradients = _results_and_gradients(loop, live, w, inputs)
    parts, terms = [], [] if is_zero(dw) else [weighted(results[loop.trained], dw).sum()]
    # In the loop `jax.vjp` would already sum the gradients of the others over devices, and each device would count the
    # whole sum. So they take another pass.
    if others:

        def total(*leaves):
            return weighted(token_results(loop, structure.unflatten(leaves))[loop.trained], w).sum()

        terms.append(jvp_of_some(total, leaves, others, [steps[i] for i in others])[1])
    for i, gradient in zip(live, gradients, strict=True):
        gradient, step = (x.astype(w.dtype) for x in (gradient, steps[i]))  # both may be bfloat16
        (parts if of_classes[i] else terms).append(mul0(gradient, step).sum())
    if parts:
        terms.append(over_devices(functools.reduce(jnp.add, parts), mesh_names(loop.class_axis)))
    sums = [weighted(r, w).sum(0) for r in results]
    tangent = [jnp.zeros_like(s) if is_zero(dw) else weighted(r, dw).sum(0) for r, s in zip(results, sums, strict=True)]
    tangent[loop.trained] = functools.reduce(jnp.add, terms)
    return sums, tangent


weighted_sums.defjvp(_weighted_sums_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _results_and_gradients(loop, live, w, inputs):
    """All results, and the gradients of the trained one's weighted sum in the leaves numbered `live` of the inputs."""
    return _in_one_loop(loop, live, w, inputs)


# The value comes from another call, as in the rule of `token_results`.
def _results_and_gradients_rule(loop, live, primals, tangents):
    require_differentiable(loop.refused)

    def in_one_loop(w, inputs):
        return _in_one_loop(loop, live, w, inputs)

    return _results_and_gradients(loop, live, *primals), live_jvp(in_one_loop, primals, tangents)[1]


_results_and_gradients.defjvp(_results_and_gradients_rule, symbolic_zeros=True)


def _in_one_loop(loop, live, w, inputs):
    return loop.on_each_platform(functools.partial(_summed, loop, live), w, inputs.unhoisted(w))


def _summed(loop, live, platform, w, inputs):
    """`_results_and_gradients` on a platform."""
    first_of_heads = len(inputs.hidden) + len(inputs.tokens)
    of_tokens = sum(i < first_of_heads for i in live)  # the gradients of the others are summed over chunks
    # Without the checkpoint, the derivative of this loop would keep the logits of all chunks.
    of_chunk = jax.checkpoint(functools.partial(_chunk_and_gradients, loop, live, platform), prevent_cse=False)

    def step(sums, chunk):
        w, hidden, tokens = chunk
        results, gradients = of_chunk(w, inputs._replace(hidden=hidden, tokens=tokens))
        by_token, parts = gradients[:of_tokens], list(gradients[of_tokens:])
        return parts if sums is None else jax.tree.map(jnp.add, sums, parts), (results, by_token)

    leaves = jax.tree.leaves(inputs)
    zeros = [jnp.zeros_like(leaves[i]) for i in live[of_tokens:]]
    tokens = w, inputs.hidden, inputs.tokens
    sums, (results, by_token) = over_chunks(step, loop.chunks(platform), zeros, tokens, loop.kept(inputs))
    return results, [*by_token, *sums]


def _chunk_and_gradients(loop, live, platform, w, inputs):
    """The results of a chunk, and the gradients of the trained one's weighted sum."""
    leaves, structure = jax.tree.flatten(inputs)

    def total(*values):
        results = loop.of_chunk(platform, structure.unflatten(replaced(leaves, live, values)))
        return weighted(results[loop.trained], w).sum(), results

    value, pull_back, results = jax.vjp(total, *(leaves[i] for i in live), has_aux=True)
    return results, pull_back(jnp.ones_like(value))
