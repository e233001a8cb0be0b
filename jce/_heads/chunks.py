"""Tokens in chunks: hidden states, a head, and their logits, of which no more than a chunk exists at a time.

The head W [n, d] gives a token of hidden state h the logits x = soft_cap(W h + b). A function of them, token by token,
is a `lax.scan` over chunks of tokens whose body is checkpointed, so that every derivative recomputes a chunk's logits
instead of keeping all: N × n numbers never exist, in any mode, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._arguments import (
    as_array,
    broadcasts_to,
    described,
    float_dtype,
    integer,
    require_bool,
    require_boolean,
)
from jce._classes import barrier, vary_over, varying
from jce._heads.called import Called
from jce._heads.kept import filled, over_kept
from jce._heads.products import Head
from jce._heads.temperature import checked_temperature
from jce._layout import over_devices
from jce._mul0 import mul0
from jce._platforms import Chunks, ChunkSize

REDUCTIONS = ("mean", "sum", "none")


# Chunks


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
    if isinstance(count, int):
        chunks = max(1, -(-count // size))
        # Chunks that need no filling save a copy of all hidden states; a few more are worth it.
        chunks = next((k for k in range(chunks, chunks + chunks // 8 + 1) if count % (k * devices) == 0), chunks)
    else:
        chunks = -(-count // size)  # of a symbolic number of tokens, which is at least 1, as symbolic
    size = -(-count // chunks)
    if kept is not None and not empty:
        return over_kept(step, kept, chunks, devices, tokens)

    def split(x):
        x = filled(x, chunks * size)
        return x.reshape(size, chunks, *x.shape[1:]).swapaxes(0, 1) if apart else x.reshape(chunks, size, *x.shape[1:])

    def join(x):
        return (x.swapaxes(0, 1) if apart else x).reshape(chunks * size, *x.shape[2:])[:count]

    tokens = jax.tree.map(split, tokens)
    if peeled and isinstance(count, int):
        carry, first = step(None, jax.tree.map(lambda x: x[0], tokens))
        if chunks > 1:
            # Behind the barrier the first stays a step of its own, and is over before the others.
            carry, first = barrier((carry, first))
        results = jax.tree.map(lambda x: x[None], first)
        if chunks > 1:
            rest = jax.tree.map(lambda x: x[1:], tokens)
            carry, others = lax.scan(step, carry, _after(first, rest) if chunks == 2 else rest)
            results = jax.tree.map(lambda *parts: jnp.concatenate(parts), results, others)
    else:
        carry, results = lax.scan(step, carry, tokens)
    return carry, jax.tree.map(join, results)


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


# Arguments


def head_of(function: str, h: Array, w: Array, b: Array | None) -> tuple[Array, Head]:
    """Hidden states and their head as they are multiplied; no class is one of logit 0."""
    dtype = float_dtype(function, {"hidden": h, "head": w} | ({} if b is None else {"bias": b}))
    b = jnp.zeros(w.shape[0], dtype) if b is None else b.astype(dtype)
    if w.shape[0] == 0:
        w, b = jnp.zeros((1, w.shape[1]), w.dtype), jnp.zeros(1, dtype)
    h, w = _stored(h, dtype), _stored(w, dtype)
    return h, Head(lax.stop_gradient(w), w.astype(dtype), b)


def _stored(x: Array, dtype) -> Array:
    """Half precision as it is, where it is multiplied with sums in float32."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) and dtype == jnp.float32 else x.astype(dtype)


def checked(
    function: str,
    labels: ArrayLike,
    hidden: ArrayLike,
    head: ArrayLike | Called,
    several: bool = False,
    temperature: ArrayLike = 1.0,
    **optional: ArrayLike | None,
) -> dict[str, Array]:
    """The arguments that are given, as arrays whose shapes agree; optional are bias, weights and where.

    Of several labels a token, theirs is a last axis.
    """
    given = {"labels": labels, "hidden": hidden} | ({} if isinstance(head, Called) else {"head": head})
    given |= {name: x for name, x in optional.items() if x is not None}
    got = {name: as_array(function, name, x) for name, x in given.items()}
    y, h = got["labels"], got["hidden"]
    w = head.logits if isinstance(head, Called) else got["head"]
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must be integers, a class index for each token; got {described(got)}. The target comes"
            f" first, then hidden and head."
        )
    if "head" in got and (h.ndim == 0 or w.ndim != 2 or h.shape[-1] != w.shape[1]):
        transposed = w.ndim == 2 and h.ndim > 0 and h.shape[-1] == w.shape[0]
        raise ValueError(
            f"{function}: hidden must be [..., d] and head [n, d], a row for each class; got {described(got)}."
            f" {'Transpose the head.' if transposed else 'The order is labels, hidden, head.'}"
        )
    batch, n = h.shape[:-1], w.shape[0]
    if y.shape != batch and not (several and y.ndim == h.ndim and y.shape[:-1] == batch):
        or_more = ", or that and an axis for k labels of each token last" if several else ""
        raise ValueError(
            f"{function}: labels must have the shape of hidden without its last axis, {batch}{or_more}; got"
            f" {described(got)}. The target comes first, then hidden and head."
        )
    if "bias" in got and got["bias"].shape != (n,):
        raise ValueError(
            f"{function}: bias must have the shape ({n},), a number for each row of head; got {described(got)}."
        )
    require_choice_of_tokens(function, got, batch, n)
    float_dtype(function, {name: x for name, x in got.items() if name in ("hidden", "head", "bias", "weights")})
    return got | checked_temperature(function, temperature, batch)


def require_choice_of_tokens(function: str, got: Mapping[str, Array], batch: tuple[int, ...], n: int) -> None:
    """That weights and `where`, as far as they are given, are of tokens, under a head of n classes."""
    for name in ("weights", "where"):
        if name in got and not broadcasts_to(batch, got[name].shape):
            advice = "give it no axis for classes; those are excluded by a bias of -inf."
            if name == "weights" and got[name].shape == (n,):
                advice = "look up those of classes by the tokens' labels: weights=weights[labels]."
            raise ValueError(
                f"{function}: {name} must broadcast to the token axes, {batch}; got {described(got)}. It is of tokens,"
                f" so {advice}"
            )
    if "where" in got:
        require_boolean(function, got["where"], got)


def checked_chunk(function: str, chunk_size: int | None, batch_invariant: bool) -> ChunkSize:
    require_bool(function, batch_invariant=batch_invariant)
    if batch_invariant and chunk_size is None:
        raise ValueError(
            f"{function}: batch_invariant must come with a chunk_size, to which each chunk is then filled up; got"
            f" batch_invariant={batch_invariant!r}, chunk_size={chunk_size!r}."
        )
    if chunk_size is None:
        return ChunkSize(None)
    size = integer(chunk_size)
    if size is None or size < 1:
        raise ValueError(
            f"{function}: chunk_size must be a static int, the number of tokens in a chunk, at least 1;"
            f" got chunk_size={chunk_size!r}. Leave it out for a size that suits the head."
        )
    return ChunkSize(size, batch_invariant)


def shares(w: Array, token_axes: tuple) -> Array:
    """w / Σ w, and 0 if Σ w is 0."""
    total = over_devices(w.sum(), token_axes)
    inverse = jnp.where(total == 0, jnp.zeros_like(total), 1 / jnp.where(total == 0, jnp.ones_like(total), total))
    return mul0(jnp.broadcast_to(inverse, w.shape), w)  # a loss of +∞ at weight 0 is 0 in the others' derivatives too
