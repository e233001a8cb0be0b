"""A head's logits, said by what they are made of."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._arguments import as_array, as_number, described, float_dtype, positive


@dataclasses.dataclass(frozen=True)
class Linear:
    """hidden · headᵀ + bias: the logits [..., n] of tokens under a head, for the functions that never make them all.

    Args:
      hidden: real, [..., d], a state for each token.
      head: real, [n, d], a row for each class: the layout of an embedding table. Of a Dense layer of flax it is
        kernel.T; where n = d, the wrong layout can't be seen.
      bias: real, [n], or None. A class with bias -∞ is forbidden: its logit is -∞.
      logit_soft_cap: c > 0, a number: the logits x are then c tanh((hidden · headᵀ + bias)/c). None for none. A traced
        one isn't checked.

    Returns:
      An argument for `linear_map` and `linear_kl_divergence`, with these attributes. A tree of its arrays, so that it
      passes through `jax.jit`, `jax.grad` and their like; a Python number as soft cap is part of the tree's structure.

    Raises:
      ValueError: in these functions, if shapes disagree or the cap isn't above 0.

    Example:
      >>> print(jce.linear_map(jnp.argmax, jce.Linear(jnp.eye(2), 20 * jnp.eye(3, 2))))
      [0 1]
    """

    hidden: ArrayLike
    head: ArrayLike
    bias: ArrayLike | None = None
    logit_soft_cap: ArrayLike | None = None

    def __repr__(self) -> str:
        """With shapes and dtypes for arrays."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return f"Linear({', '.join(f'{name}={_brief(x)}' for name, x in fields.items())})"


def _brief(x) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else repr(x)


class LinearArrays(NamedTuple):
    """The same, whose shapes agree."""

    hidden: Array
    head: Array
    bias: Array | None
    logit_soft_cap: Array | None


def checked_linear(x: Linear, function: str, name: str) -> LinearArrays:
    given = {f"{name}.{field.name}": getattr(x, field.name) for field in dataclasses.fields(x)}
    cap = given.pop(f"{name}.logit_soft_cap")
    got: dict[str, Array] = {}
    for field, array in given.items():
        if array is not None or not field.endswith(".bias"):
            got[field] = as_array(function, field, array)
    dtype, (h, w, *b) = float_dtype(function, got), got.values()
    if h.ndim == 0 or w.ndim != 2 or h.shape[-1] != w.shape[1]:
        transposed = w.ndim == 2 and h.ndim > 0 and h.shape[-1] == w.shape[0]
        raise ValueError(
            f"{function}: of a Linear, hidden must be [..., d] and head [n, d], a row for each class; got"
            f" {described(got)}. {'Transpose the head.' if transposed else 'The order is hidden, head.'}"
        )
    if b and b[0].shape != w.shape[:1]:
        raise ValueError(
            f"{function}: of a Linear, bias must have the shape ({w.shape[0]},), a number for each row of head; got"
            f" {described(got)}."
        )
    if cap is not None:
        cap = as_number(function, "logit_soft_cap", cap)
        cap = jnp.asarray(positive(function, dtype, logit_soft_cap=cap), dtype)
    return LinearArrays(h, w, b[0] if b else None, cap)


def _flatten(x: Linear):
    cap = x.logit_soft_cap
    number = cap if isinstance(cap, (int, float)) else None
    children = {"hidden": x.hidden, "head": x.head, "bias": x.bias, "logit_soft_cap": cap if number is None else None}
    return [(jax.tree_util.GetAttrKey(name), child) for name, child in children.items()], number


def _unflatten(number, children) -> Linear:
    hidden, head, bias, cap = children
    return Linear(hidden, head, bias, cap if number is None else number)


jax.tree_util.register_pytree_with_keys(Linear, _flatten, _unflatten)
