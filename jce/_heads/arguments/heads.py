"""Checks hidden states and their heads, which are matrices or functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jce._heads.linear import Linear
from jce._heads.loss.function_head import FunctionHead
from jce._jax.arguments import as_array, as_number, described, float_dtype, is_array, is_function, positive


def linear_of(
    name: str,
    hidden: ArrayLike | Linear,
    head: Any,
    bias: ArrayLike | None,
    logit_soft_cap: ArrayLike | None,
) -> Linear:
    """The `Linear` of these four arguments, or `hidden` itself if it is a `Linear`."""
    rest = {"head": head, "bias": bias, "logit_soft_cap": logit_soft_cap}
    if isinstance(hidden, Linear):
        if given := [key for key, x in rest.items() if x is not None]:
            raise ValueError(
                f"{name}: a jce.Linear stands for hidden, head, bias and logit_soft_cap; got {', '.join(given)}"
                f" as well. Pass them to jce.Linear instead."
            )
        return hidden
    if head is None:
        raise TypeError(
            f"{name}: head must be [n, d], or a function of hidden states; got None. Pass labels first, then"
            f" hidden and head, or jce.Linear(hidden, head) for both. If a model returned logits instead of a"
            f" jce.Linear, the head that it calls has not been replaced."
        )
    if is_function(head):
        head = FunctionHead.of(name, head, hidden, bias)
    return Linear(hidden, head, bias, logit_soft_cap)


class Arrays(NamedTuple):
    """The arrays of a `Linear`, after a check that their shapes agree."""

    hidden: Array
    head: tuple[Array, Array | None] | FunctionHead  # the pair of a matrix [n, d] and its bias, or a function
    logit_soft_cap: Array | None


def checked_linear(name: str, key: str, x: Linear) -> Arrays:
    """The arrays of a `Linear`. Errors call it by this key, which is empty if the caller passed hidden and head."""
    of = f"{key}." if key else ""
    if isinstance(x.head, FunctionHead):
        return _of_function(name, of, x, x.head)
    given = {"hidden": x.hidden, "head": x.head} | ({} if x.bias is None else {"bias": x.bias})
    got = {f"{of}{field}": as_array(name, f"{of}{field}", array) for field, array in given.items()}
    dtype, whose = float_dtype(name, got), "of a Linear, " if key else ""
    h, w, *b = got.values()
    if h.ndim == 0 or w.ndim != 2 or h.shape[-1] != w.shape[1]:
        transposed = w.ndim == 2 and h.ndim > 0 and h.shape[-1] == w.shape[0]
        raise ValueError(
            f"{name}: {whose}hidden must be [..., d] and head [n, d], a row for each class; got {described(got)}."
            f" {'Transpose the head.' if transposed else 'The order is hidden, head; labels come first.'}"
        )
    if b and b[0].shape != w.shape[:1]:
        raise ValueError(
            f"{name}: {whose}bias must have the shape ({w.shape[0]},), a number for each row of head; got"
            f" {described(got)}."
        )
    return Arrays(h, (w, b[0] if b else None), _checked_cap(name, x.logit_soft_cap, dtype))


def _of_function(name: str, of: str, x: Linear, head: FunctionHead) -> Arrays:
    h = as_array(name, f"{of}hidden", x.hidden)
    float_dtype(name, {f"{of}hidden": h})
    as_traced = [v.aval.shape for v in head.jaxpr.constvars]
    if (shapes := [a.shape for a in head.arrays]) != as_traced:
        raise ValueError(
            f"{name}: the arrays that the head of a Linear closes over must have the shapes with which the head was"
            f" traced, {as_traced}; got {of}head with {shapes}. A jax.vmap must not return a Linear whose head is a"
            f" function: call {name} inside of it, or return hidden states from it and pass jax.vmap(head) as the head."
        )
    return Arrays(h, head, _checked_cap(name, x.logit_soft_cap, head.logits.dtype))


def _checked_cap(name: str, cap: ArrayLike | None, dtype) -> Array | None:
    if cap is None:
        return None
    number = positive(name, dtype, logit_soft_cap=as_number(name, "logit_soft_cap", cap))
    # jax.transfer_guard allows an explicit transfer.
    return number if is_array(number) else jax.device_put(np.asarray(number, dtype))
