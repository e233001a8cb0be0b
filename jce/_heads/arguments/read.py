"""Reads the arguments of a function of heads as arrays. If their shapes disagree, an error says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.arguments.heads import Arrays, checked_linear
from jce._heads.inputs import Inputs, Shared, dtypes_of, wide
from jce._heads.linear import Linear
from jce._jax.arguments import as_array, broadcasts_to, described, float_dtype, require_boolean


def read(
    name: str,
    linear: Mapping[str, Linear],
    others: Mapping[str, ArrayLike],
    shared: Any,
    where: ArrayLike | None,
    weights: ArrayLike | None,
) -> tuple[Inputs, Any]:
    """The inputs, and the dtypes of the shared arrays before they were made `wide`. Errors name arguments by the keys
    of `linear` and `others`."""
    heads = {key: checked_linear(name, key, x) for key, x in linear.items()}
    tokens = {key: as_array(name, key, x) for key, x in others.items()}
    batch = _batch(name, heads, tokens)
    w, kept = _choice_of_tokens(name, batch, weights, where)
    if any(isinstance(x.head, tuple) and x.head[0].shape[0] == 0 for x in heads.values()):
        kept = jnp.zeros(batch, bool)  # without classes there is nothing to compute, so all tokens are masked
    paths, tree = jax.tree.flatten_with_path(shared)
    # Errors omit path[0]: it is the place in the tuple `shared`, which callers don't see.
    shared = tree.unflatten([as_array(name, f"shared{jax.tree_util.keystr(path[1:])}", x) for path, x in paths])
    of_all = Shared([x.logit_soft_cap for x in heads.values()], wide(shared))
    hidden = [x.hidden for x in heads.values()]
    matrices = [x.head for x in heads.values()]
    return Inputs(hidden, list(tokens.values()), w, kept, matrices, of_all), dtypes_of(shared)


ADVICE = {
    "weights": "Give a weight per token: weights=weights[labels] looks up weights per class.",
    "where": "It masks tokens, so it has no axis for classes. To exclude a class, use a bias of -inf.",
}


def _choice_of_tokens(
    name: str, batch: tuple[int, ...], weights: ArrayLike | None, where: ArrayLike | None
) -> tuple[Array | None, Array | None]:
    """`weights` and `where` as arrays that broadcast to the token axes, or None for one that is not given."""
    given = {"weights": weights, "where": where}
    got = {key: as_array(name, key, x) for key, x in given.items() if x is not None}
    for key, x in got.items():
        if not broadcasts_to(batch, x.shape):
            raise ValueError(
                f"{name}: {key} must broadcast to the token axes, {batch}; got {described(got)}. {ADVICE[key]}"
            )
    if "where" in got:
        require_boolean(name, got["where"], got)
    if "weights" in got:
        got["weights"] = got["weights"].astype(float_dtype(name, {"weights": got["weights"]}))
    return got.get("weights"), got.get("where")


def _batch(name: str, linear: Mapping[str, Arrays], others: Mapping[str, Array]) -> tuple[int, ...]:
    """The token axes, with which all arguments must begin."""
    if not linear:
        raise ValueError(
            f"{name}: at least one argument must be a jce.Linear (hidden states and their head); got"
            f" {described(others) or 'no arguments'}. To map a function without a head, use jax.vmap or jax.lax.map."
        )
    batch = next(iter(linear.values())).hidden.shape[:-1]
    hidden = {f"{key}.hidden" if key else "hidden": x.hidden for key, x in linear.items()}
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
    """Advice for an argument that lacks some token axes, has length 1 along one of them, or should be in `shared`."""
    # Arguments aren't broadcast: a shared array [1, k] may look like one with token axes, and if a random key were
    # broadcast, several tokens would get the same sample.
    shared = "An array that all tokens share goes into shared."
    leads = shape != () and all(size in (1, tokens) for size, tokens in zip(shape, batch, strict=False))
    if not leads and not broadcasts_to(batch, shape):
        return shared
    array = f"{key}[...{', None' * (len(batch) - len(shape))}]" if leads and len(shape) < len(batch) else key
    return f"Write jnp.broadcast_to({array}, {batch + shape[len(batch) :]}) to give each token its own. {shared}"
