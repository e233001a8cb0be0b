"""Makes the arrays of tokens depend on all inputs of a loop, so that nothing is computed before the loop.

Until JAX no longer hoists out of a loop any operation whose inputs don't change in it: if labels or a teacher's states
don't change, it stores the results of all operations on them alone, which are numbers for every token and class.
Until JAX no longer has XLA fold constants of this size: it would compute logits of constants during compilation.
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
    """The same token arrays. To JAX and XLA, each of them depends on all of them and on the others."""
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
