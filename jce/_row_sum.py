"""Σ along an axis, of a batch of one row too in parts on a CPU: in sequence it would be hundreds of ulps off.

XLA of jaxlib 0.10 sums [1, n] in sequence, as it doesn't [2, n] or [n]: 30,000 equal numbers to 200 ulps. So axes of
length 1 are left out. `jax.vmap` adds them to what is traced already, so that this is done when a sum is lowered: hence
a primitive, which is `jax.lax.reduce_sum` in all else.
"""

from __future__ import annotations

from jax import Array, lax
from jax.interpreters import ad, batching, mlir
from jax.lax import reduce_sum_p

from jce._waiting import Primitive

_row_sum_p = Primitive("row_sum")


def row_sum(x: Array, axis: int) -> Array:
    """jnp.sum(x, axis) of floats."""
    return _row_sum_p.bind(x, axes=(axis % x.ndim,), out_sharding=None)


def _sum(x, *, axes, **params):
    (axis,) = axes
    ones = [k for k, length in enumerate(x.shape) if k != axis and isinstance(length, int) and length == 1]
    total = reduce_sum_p.bind(lax.squeeze(x, ones), axes=(axis - sum(k < axis for k in ones),), **params)
    return lax.expand_dims(total, [k - (k > axis) for k in ones])


def _batch(arguments, at, **params):
    (x,), (k,), (axis,) = arguments, at, params["axes"]
    axis += k <= axis
    return row_sum(x, axis), k - (k > axis)


_row_sum_p.def_impl(_sum)
# Its type (shape, dtype, sharding, varying manual axes) and its transpose are the ordinary sum's.
_row_sum_p.def_abstract_eval(lambda x, **params: reduce_sum_p.abstract_eval(x, **params)[0])
ad.deflinear2(_row_sum_p, ad.primitive_transposes[reduce_sum_p])
batching.primitive_batchers[_row_sum_p] = _batch
mlir.register_lowering(_row_sum_p, mlir.lower_fun(_sum, multiple_results=False))
