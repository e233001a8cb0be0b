"""Makes the tokens' arrays depend on all inputs of a loop, so that nothing is computed ahead of it from some of them.

Until JAX no longer hoists out of a loop what is the same in each of its steps: where labels or a teacher's states are,
it keeps what depends on them alone, numbers for every token and class.
Until JAX no longer has XLA fold constants of this size: the logits of constants are computed in compilation.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._jax.primitives import primitive
from jce._jax.restricted import is_zero

T = TypeVar("T")


def unhoisted(tokens: T, *others) -> T:
    """The same arrays, but for JAX and XLA each depends on all of them, and on the others."""
    leaves, tree = jax.tree.flatten(tokens)
    return tree.unflatten([_unhoisted_p.bind(x, *leaves, *jax.tree.leaves(others)) for x in leaves])


def _behind_a_barrier(x: Array, *_) -> Array:
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else lax.optimization_barrier(x)


def _differentiate(primals, tangents):
    t, *_ = tangents
    return _unhoisted_p.bind(*primals), t if is_zero(t) else _unhoisted_p.bind(t, *primals)


_unhoisted_p = primitive(
    "unhoisted",
    _behind_a_barrier,
    _differentiate,
    (lambda ct, *_: ct,),
    lambda arrays, axes: (_unhoisted_p.bind(*arrays), axes[0]),
    types=lambda x, *_: x,
)
