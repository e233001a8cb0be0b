"""Tokens in chunks: hidden states, a head, and their logits, of which no more than a chunk exists at a time.

The head W [n, d] gives a token of hidden state h the logits x = soft_cap(W h + b). A function of them, token by token,
is a `lax.scan` over chunks of tokens whose body is checkpointed, so that every derivative recomputes a chunk's logits
instead of keeping all: N × n numbers never exist, in any mode, to any order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._classes import barrier, vary_over, varying
from jce._heads.kept import filled, over_kept
from jce._platforms import Chunks


def over_chunks(step: Callable, chunked: Chunks, carry, tokens, kept: Array | None = None):
    """`lax.scan` of a step over chunks of some size or a few tokens less, filled up with zeros.

    Where tokens are left out, over chunks of those that are kept, each from a carry of None; and so where chunks are to
    be of just that size, whose products then are the same in any number of them.

    Apart, a chunk has every k-th token: where XLA splits the tokens over devices, each of which has neighbours, all
    have as many of each chunk, and none is sent. For GPUs and TPUs it then sums the carry over devices after the loop.
    Peeled, the first step, whose carry is None, comes before the loop, so that no zeros are written to begin with.
    """
    size, devices, apart, peeled, whole = chunked
    count = jax.tree.leaves(tokens)[0].shape[0]
    empty = isinstance(count, int) and count == 0
    if whole and not empty:
        (first, *_), ones = jax.tree.leaves(tokens), jnp.ones(count, bool)
        kept = vary_over(varying(first), ones)[0] if kept is None else kept
        return over_kept(step, kept, -(-count // size), devices, tokens, -(-size // devices))
    chunks = _number_of_chunks(count, size, devices)
    size = -(-count // chunks)
    if kept is not None and not empty:
        return over_kept(step, kept, chunks, devices, tokens)

    def split(x):
        x = filled(x, chunks * size)
        return x.reshape(size, chunks, *x.shape[1:]).swapaxes(0, 1) if apart else x.reshape(chunks, size, *x.shape[1:])

    def join(x):
        return (x.swapaxes(0, 1) if apart else x).reshape(chunks * size, *x.shape[2:])[:count]

    tokens = jax.tree.map(split, tokens)
    loop = _peeled_scan if peeled and isinstance(count, int) else lax.scan
    carry, results = loop(step, carry, tokens)
    return carry, jax.tree.map(join, results)


def _number_of_chunks(count, size: int, devices: int):
    """Where a few more chunks need no filling they are worth it: that would copy all hidden states."""
    if not isinstance(count, int):
        return -(-count // size)  # of a symbolic number of tokens, which is at least 1, as symbolic
    chunks = max(1, -(-count // size))
    return next((k for k in range(chunks, chunks + chunks // 8 + 1) if count % (k * devices) == 0), chunks)


def _peeled_scan(step: Callable, carry, chunks):
    """`lax.scan`, but the first step comes before the loop, from no carry."""
    carry, first = step(None, jax.tree.map(lambda x: x[0], chunks))
    results, rest = jax.tree.map(lambda x: x[None], first), jax.tree.map(lambda x: x[1:], chunks)
    number = 1 + jax.tree.leaves(rest)[0].shape[0]
    if number == 1:
        return carry, results
    # Behind the barrier the first stays a step of its own, and is over before the others.
    carry, first = barrier((carry, first))
    carry, others = lax.scan(step, carry, _after(first, rest) if number == 2 else rest)
    return carry, jax.tree.map(lambda x, others: jnp.concatenate((x[None], others)), first, others)


@jax.custom_jvp
def _after(first, rest):
    """The rest, as XLA may not begin with before there is the first: what isn't a loop, as a loop of one, would compute
    its logits beside those of the first, and hold both."""
    return barrier((first, rest))[1]


# No derivative waits for a value.
_after.defjvp(lambda primals, tangents: (_after(*primals), tangents[1]))


def each_token(function: Callable, chunked: Chunks, *tokens: Array, kept: Array | None = None):
    """The function of chunks of tokens, with nothing kept of a chunk but its results, whatever is differentiated."""
    step = jax.checkpoint(lambda carry, chunk: (carry, function(*chunk)), prevent_cse=False)
    return over_chunks(step, chunked._replace(peeled=False), None, tokens, kept)[1]
