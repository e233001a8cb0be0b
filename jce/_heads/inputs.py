"""`Inputs`: the arrays of a call, between the checks of the arguments and the loop over chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Shared(NamedTuple):
    """The arrays that all tokens share: a pytree."""

    caps: list[Any]  # each head's soft cap, or None
    given: Any  # the caller's arrays, made `wide`
    closed_over: Any = ()  # the arrays that the per-chunk function closes over, made `wide`
    first: Any = ()  # hidden and others of one kept token, which replace those of masked tokens


class Inputs(NamedTuple):
    """Arrays of tokens, their heads, and arrays that all tokens share: a pytree.

    `arguments` returns them with the token axes [...], to which weights and `kept` need only broadcast. The loop takes
    them as `places/part.py` returns them: all tokens in one axis [N], and heads ready for the matmul.
    """

    hidden: list[Array]  # [..., d], for each head
    others: list[Array]  # such as labels [...] or a teacher's probabilities [..., k]
    weights: Any  # one per token, or None; in the loop, the factors of the results, such as w/Σw for a mean
    kept: Any  # bool: which tokens are not masked; None for all
    heads: list[Any]  # at first pairs (matrix [n, d], bias or None), in the loop `Head`s; or `FunctionHead`s in both
    shared: Shared

    @property
    def batch(self) -> tuple[int, ...]:
        """The token axes."""
        return self.hidden[0].shape[:-1]

    @property
    def tokens(self) -> tuple:
        """The fields whose arrays have token axes."""
        return self.hidden, self.others, self.weights, self.kept

    def with_tokens(self, tokens: tuple) -> Inputs:
        """The inputs with these fields in place of `tokens`."""
        hidden, others, weights, kept = tokens
        return Inputs(hidden, others, weights, kept, self.heads, self.shared)

    def sharing(self, **more: Any) -> Inputs:
        """The inputs with these fields of `shared` replaced."""
        return self._replace(shared=self.shared._replace(**more))


# If classes are split over devices, each device has only its own classes' part of the gradients of these fields.
OF_CLASSES = ("hidden", "heads")


def first_of(x: Array, at: int | Array = 0) -> Array:
    """The part of x [N, ...] for one token, as a constant; zeros if there are no tokens."""
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        return jnp.zeros(x.shape[1:], x.dtype)
    return lax.stop_gradient(x[at])


def expanded(number: Array, x: Array) -> Array:
    """One number per token, [N], expanded to the rank of x [N, ...]."""
    return jnp.expand_dims(number, range(1, x.ndim))


def wide(tree: Any) -> Any:
    """The arrays in the dtypes in which a loop sums their gradients: float32 at least."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x) else x, tree)


def is_narrow(x: Array) -> bool:
    """Whether x is floating-point, in half precision or narrower."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def dtypes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.dtype, tree)


def in_dtypes(tree: Any, dtypes: Any) -> Any:
    """The arrays in the dtypes that they had before `wide`."""
    return jax.tree.map(lambda x, dtype: x if x.dtype == dtype else x.astype(dtype), tree, dtypes)
