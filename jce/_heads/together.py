"""What a loop over tokens is of, held together, so that nothing is made for all tokens of some of it.

Inside of another loop, in which labels or a teacher's states are the same at each step, JAX before 0.12 computes what
follows from them alone once, before that loop, and keeps it: numbers for every token and class. XLA computes the logits
of constants while it compiles. So the tokens' arrays are said to depend on all that the loop takes.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._primitives import is_zero, primitive

T = TypeVar("T")


def together(tokens: T, *others) -> T:
    """A tree of arrays, each as it is, but said to depend on all of them and on the others."""
    leaves, tree = jax.tree.flatten(tokens)
    return tree.unflatten([_together_p.bind(x, *leaves, *jax.tree.leaves(others)) for x in leaves])


def _behind_a_barrier(x: Array, *_) -> Array:
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else lax.optimization_barrier(x)


def _differentiate(primals, tangents):
    t, *_ = tangents
    return _together_p.bind(*primals), t if is_zero(t) else _together_p.bind(t, *primals)


_together_p = primitive(
    "together",
    _behind_a_barrier,
    _differentiate,
    (lambda ct, *_: ct,),
    lambda arrays, axes: (_together_p.bind(*arrays), axes[0]),
    types=lambda x, *_: x,
)
