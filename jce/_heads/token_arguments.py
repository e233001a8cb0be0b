"""Checks the arguments of functions of heads: they are arrays whose shapes agree, or an error says which don't."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.called import Called
from jce._heads.linear import LinearArrays, require_head
from jce._heads.temperature import checked_temperature
from jce._jax.arguments import (
    as_array,
    broadcasts_to,
    described,
    float_dtype,
    integer,
    is_real,
    require_bool,
    require_boolean,
)
from jce._jax.platforms import ChunkSize

REDUCTIONS = ("mean", "sum", "none")


def checked(
    function: str,
    labels: ArrayLike,
    hidden: ArrayLike,
    head: ArrayLike | Called,
    several: bool = False,
    temperature: ArrayLike = 1.0,
    **optional: ArrayLike | None,
) -> dict[str, Array]:
    """The arguments that are given, as arrays whose shapes agree. Optional ones are bias, weights and where.

    With `several`, labels may have a last axis more, of several labels for each token.
    """
    given = {"labels": labels, "hidden": hidden} | ({} if isinstance(head, Called) else {"head": head})
    given |= {name: x for name, x in optional.items() if x is not None}
    got = {name: as_array(function, name, x) for name, x in given.items()}
    y, h = got["labels"], got["hidden"]
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must be integers, a class index for each token; got {described(got)}. The target comes"
            f" first, then hidden and head."
        )
    if not isinstance(head, Called):
        require_head(f"{function}: hidden", h, got["head"], got, "The order is labels, hidden, head.")
    batch, n = h.shape[:-1], (head.logits if isinstance(head, Called) else got["head"]).shape[0]
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
    require_choice_of_tokens(function, got, batch)
    float_dtype(function, {name: x for name, x in got.items() if name in ("hidden", "head", "bias", "weights")})
    return got | checked_temperature(function, temperature, batch)


OF_TOKENS = {
    "weights": "Give a weight per token: weights=weights[labels] looks up weights per class.",
    "where": "It masks tokens, so give it no axis for classes; a bias of -inf excludes a class.",
}


def require_choice_of_tokens(function: str, got: Mapping[str, Array], batch: tuple[int, ...]) -> None:
    """Raises if weights or `where` are given and don't broadcast to the token axes."""
    for name, advice in OF_TOKENS.items():
        if name in got and not broadcasts_to(batch, got[name].shape):
            raise ValueError(
                f"{function}: {name} must broadcast to the token axes, {batch}; got {described(got)}. {advice}"
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


def checked_batch(name: str, linear: Mapping[str, LinearArrays], others: Mapping[str, Array]) -> tuple[int, ...]:
    """The token axes, with which all arguments must begin."""
    if not linear:
        raise ValueError(
            f"{name}: an argument must be a jce.Linear, hidden states and their head; got"
            f" {described(others) or 'no arguments'}. Without a head there are jax.vmap and jax.lax.map."
        )
    batch = next(iter(linear.values())).hidden.shape[:-1]
    hidden = {f"{key}.hidden": x.hidden for key, x in linear.items()}
    advice = [_for_each_token(key, x.shape, batch) for key, x in others.items() if x.shape[: len(batch)] != batch]
    if any(x.shape[:-1] != batch for x in hidden.values()):
        advice.insert(0, "Give all Linears the states of the same tokens.")
    if advice:
        raise ValueError(
            f"{name}: all arguments must begin with the token axes of hidden, {batch}; got"
            f" {described(hidden | dict(others))}. {advice[0]}"
        )
    return batch


def _for_each_token(key: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """What to do with an argument that lacks token axes, or has length 1 along some, or is shared by all tokens."""
    # Arguments aren't broadcast: a shared array [1, k] may look like one with token axes, and a random key that was
    # broadcast would give several tokens the same sample.
    shared = "What all tokens share goes into shared."
    leads = shape != () and all(size in (1, tokens) for size, tokens in zip(shape, batch, strict=False))
    if not leads and not broadcasts_to(batch, shape):
        return shared
    array = f"{key}[...{', None' * (len(batch) - len(shape))}]" if leads and len(shape) < len(batch) else key
    return f"Write jnp.broadcast_to({array}, {batch + shape[len(batch) :]}) to give each token its own. {shared}"


def require_real(name: str, results: list) -> None:
    """Raises if one of a token's results, which are to be summed or weighted, isn't real."""
    odd = [x for x in results if not is_real(x)]
    if odd:
        got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in odd)
        raise TypeError(
            f"{name}: what is summed or weighted must be real (floating-point, integer or bool); function gives {got}"
            f' for a token. Make real numbers of it, or ask for each with reduction="none" and no weights.'
        )


def require_zeros(name: str, results: list) -> None:
    """Raises if one of a token's results can't be 0, as it is for a token that is left out."""
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in results):
        raise TypeError(
            f"{name}: with `where`, weights or batch_invariant function may not give random keys, of which there is"
            f" no 0 for a token that is left out. Give jax.random.key_data of them."
        )


def checked_choice(name: str, batch: tuple[int, ...], **given: ArrayLike | None) -> dict[str, Array]:
    """weights and `where`, if they are given, as arrays that broadcast to the token axes."""
    got = {key: as_array(name, key, x) for key, x in given.items() if x is not None}
    require_choice_of_tokens(name, got, batch)
    if "weights" in got:
        got["weights"] = got["weights"].astype(float_dtype(name, {"weights": got["weights"]}))
    return got
