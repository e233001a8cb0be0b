"""The arrays of a call, on their way from its arguments to the loop over chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Shared(NamedTuple):
    """What all tokens share: a tree of arrays."""

    caps: list[Any]  # each head's soft cap, or None
    given: Any  # what a caller gives, `wide`
    closed_over: Any = ()  # what the function of a chunk closes over, `wide`
    first: Any = ()  # hidden and others of one token that is kept, in place of those of tokens that aren't


class Inputs(NamedTuple):
    """Arrays of tokens, their heads, and arrays that all tokens share: a tree.

    As `arguments` gives them, tokens have the axes [...], but weights and `kept` may only broadcast to them. As the
    loop takes them (`places/part.py`), all tokens are in one axis [N], and heads are ready to be multiplied.
    """

    hidden: list[Array]  # [..., d], for each head
    others: list[Array]  # such as labels [...] or teacher's probabilities [..., k]
    weights: Any  # of tokens, or None; in the loop the factors of their results, such as w/Σw for a mean
    kept: Any  # bool: which tokens take part; None for all
    heads: list[Any]  # at first pairs of a matrix [n, d] and its bias or None, then `Head`s; or `FunctionHead`s
    shared: Shared

    @property
    def batch(self) -> tuple[int, ...]:
        """The token axes."""
        return self.hidden[0].shape[:-1]

    @property
    def tokens(self) -> tuple:
        """The fields that have parts for each token."""
        return self.hidden, self.others, self.weights, self.kept

    def with_tokens(self, tokens: tuple) -> Inputs:
        """The inputs with these fields in place of `tokens`."""
        hidden, others, weights, kept = tokens
        return Inputs(hidden, others, weights, kept, self.heads, self.shared)

    def sharing(self, **more: Any) -> Inputs:
        """The inputs with more that all tokens share."""
        return self._replace(shared=self.shared._replace(**more))


# The fields of which a device's gradient is only its classes' part, where classes are split over devices.
OF_CLASSES = ("hidden", "heads")


def first_of(x: Array, at: int | Array = 0) -> Array:
    """One token's part of x [N, ...], as a constant; zeros if there are no tokens."""
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        return jnp.zeros(x.shape[1:], x.dtype)
    return lax.stop_gradient(x[at])


def expanded(number: Array, x: Array) -> Array:
    """A number per token, with as many axes as x has."""
    return jnp.expand_dims(number, range(1, x.ndim))


def wide(tree: Any) -> Any:
    """The arrays in the dtypes in which a loop sums their gradients: float32 at least."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x) else x, tree)


def is_narrow(x: Array) -> bool:
    """Whether x is of half precision, or narrower."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def dtypes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.dtype, tree)


def in_dtypes(tree: Any, dtypes: Any) -> Any:
    """The arrays in the dtypes that they had before `wide`."""
    return jax.tree.map(lambda x, dtype: x if x.dtype == dtype else x.astype(dtype), tree, dtypes)
