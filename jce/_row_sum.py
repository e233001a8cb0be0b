"""Σ along an axis, of a batch of one row too in parts on a CPU: in sequence it would be hundreds of ulps off.

XLA of jaxlib 0.10 sums [1, n] in sequence, as it doesn't [2, n] or [n]: 30,000 equal numbers to 200 ulps. So axes of
length 1 are left out. `jax.vmap` adds them to what is traced already, so that this is done when a sum is lowered: hence
a primitive, which is `jax.lax.reduce_sum` in all else.
"""

from __future__ import annotations

from jax import Array, lax
from jax.interpreters import ad
from jax.lax import reduce_sum_p

from jce._primitives import primitive


def row_sum(x: Array, axis: int) -> Array:
    """jnp.sum(x, axis) of floats."""
    return _row_sum_p.bind(x, axes=(axis % x.ndim,), out_sharding=None)


def _sum(x, *, axes, out_sharding):
    (axis,) = axes
    ones = [k for k, length in enumerate(x.shape) if k != axis and isinstance(length, int) and length == 1]
    at = axis - sum(k < axis for k in ones)
    total = reduce_sum_p.bind(lax.squeeze(x, ones), axes=(at,), out_sharding=out_sharding)
    return lax.expand_dims(total, [k - (k > axis) for k in ones])


def _batch(arguments, at, **params):
    (x,), (k,), (axis,) = arguments, at, params["axes"]
    axis += k <= axis
    return row_sum(x, axis), k - (k > axis)


# Its type (shape, dtype, sharding, varying manual axes) and its transpose are the ordinary sum's.
_row_sum_p = primitive(
    "row_sum",
    _sum,
    (lambda t, x, *, axes, **_: row_sum(t, *axes),),
    ad.primitive_transposes[reduce_sum_p],
    _batch,
    types=lambda x, **static: reduce_sum_p.abstract_eval(x, **static)[0],
)
