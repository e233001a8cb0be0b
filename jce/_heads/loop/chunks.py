"""Loops over chunks of tokens, so that only one chunk's logits exist at a time.

The body of a loop is checkpointed, by `each_token` or by the caller. So every derivative recomputes the logits of a
chunk instead of keeping all logits. N × n numbers are never in memory, in any mode, to any order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.loop.chunk_rule import Chunks
from jce._heads.loop.kept_tokens import over_kept, padded
from jce._jax.varying import barrier, vary_over, varying


def over_chunks(step: Callable, chunks: Chunks, carry, tokens, kept: Array | None = None):
    """`lax.scan` of step(carry, chunk) over chunks of at most `chunks.size` tokens. The last chunk is padded with
    zeros. A step must accept None in place of a carry of zeros.

    With `kept`, the loop runs over chunks of the kept tokens only, and the returned carry is the sum of the carries of
    step(None, chunk). With `chunks.filled` it runs in the same way, over all tokens if `kept` is None. Each chunk then
    has the same size, whatever the number of tokens, so a matmul has the same bits in any number of chunks.

    If `chunks.strided`, a chunk takes every k-th token. If XLA splits tokens over devices, each device has consecutive
    tokens. So a strided chunk has an equal part on each device, and no hidden states are sent. XLA sums the carry over
    devices after the loop on GPUs and TPUs, and in each step on CPUs. If `chunks.peeled`, the first step, whose carry
    is None, runs before the loop, so that no zeros are written as an initial carry.
    """
    size, devices, strided, peeled, filled = chunks
    count = jax.tree.leaves(tokens)[0].shape[0]
    empty = isinstance(count, int) and count == 0
    if filled and not empty:
        if kept is None:
            # Unlike hidden states, `kept` must not vary over the mesh axes of the classes: results would vary too.
            kept = vary_over(frozenset.intersection(*map(varying, jax.tree.leaves(tokens))), jnp.ones(count, bool))[0]
        return over_kept(step, kept, -(-count // size), devices, tokens, -(-size // devices))
    number = _number_of_chunks(count, size, devices)
    size = -(-count // number)
    if kept is not None and not empty:
        return over_kept(step, kept, number, devices, tokens)

    def split(x):
        x = padded(x, number * size)
        return (
            x.reshape(size, number, *x.shape[1:]).swapaxes(0, 1) if strided else x.reshape(number, size, *x.shape[1:])
        )

    def join(x):
        return (x.swapaxes(0, 1) if strided else x).reshape(number * size, *x.shape[2:])[:count]

    tokens = jax.tree.map(split, tokens)
    loop = _peeled_scan if peeled and isinstance(count, int) else lax.scan
    carry, results = loop(step, carry, tokens)
    return carry, jax.tree.map(join, results)


def _number_of_chunks(count, size: int, devices: int):
    """The number of chunks. It is up to an eighth larger than needed if that avoids padding, which would copy all
    hidden states."""
    if not isinstance(count, int):
        return -(-count // size)  # the number of tokens is symbolic, and at least 1
    chunks = max(1, -(-count // size))
    return next((more for more in range(chunks, chunks + chunks // 8 + 1) if count % (more * devices) == 0), chunks)


def _peeled_scan(step: Callable, carry, chunks):
    """`lax.scan`, except that the first step, whose carry is None, is peeled off and runs before the loop."""
    carry, first = step(None, jax.tree.map(lambda x: x[0], chunks))
    results, rest = jax.tree.map(lambda x: x[None], first), jax.tree.map(lambda x: x[1:], chunks)
    number = 1 + jax.tree.leaves(rest)[0].shape[0]
    if number == 1:
        return carry, results
    # Because of the barrier, the first step ends before the loop begins: side by side they would take twice the memory.
    carry, first = barrier((carry, first))
    carry, others = lax.scan(step, carry, _after(first, rest) if number == 2 else rest)
    return carry, jax.tree.map(lambda x, others: jnp.concatenate((x[None], others)), first, others)


@jax.custom_jvp
def _after(first, rest):
    """`rest`, made to depend on `first`. XLA inlines a loop of one step. Without this dependence, it might then compute
    the logits of both chunks side by side, which takes twice the memory."""
    return barrier((first, rest))[1]


# A tangent needs no such order, so the tangent of `rest` is passed on unchanged.
_after.defjvp(lambda primals, tangents: (_after(*primals), tangents[1]))


def each_token(function: Callable, chunks: Chunks, *tokens: Array, kept: Array | None = None):
    """The results of the function for all tokens. The function is checkpointed, so reverse mode saves only its
    arguments. There is no carry, so no step needs to be peeled."""
    step = jax.checkpoint(lambda carry, chunk: (carry, function(*chunk)), prevent_cse=False)
    return over_chunks(step, chunks._replace(peeled=False), None, tokens, kept)[1]
