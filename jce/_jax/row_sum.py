"""A sum along an axis that is accurate on a CPU also for a batch of one row.

Axes of length 1 are squeezed out before the sum. `jax.vmap` may add such axes after tracing, so they must be squeezed
when the sum is lowered. So `row_sum` is a primitive of its own. Otherwise it works like `jax.lax.reduce_sum`.
"""

# Until JAX 0.11: it sums [1, n] sequentially on a CPU (jaxlib 0.10: 30,000 equal numbers are 200 ulps off), while it
# sums [2, n] and [n] in parts.

from __future__ import annotations

from jax import Array, lax
from jax.interpreters import ad
from jax.lax import reduce_sum_p

from jce._jax.primitives import primitive


def row_sum(x: Array, axis: int) -> Array:
    """jnp.sum(x, axis) for a floating-point x."""
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


# The types (shape, dtype, sharding, varying manual axes) and the transpose are those of the ordinary sum.
_row_sum_p = primitive(
    "row_sum",
    _sum,
    (lambda t, x, *, axes, **_: row_sum(t, *axes),),
    ad.primitive_transposes[reduce_sum_p],
    _batch,
    types=lambda x, **static: reduce_sum_p.abstract_eval(x, **static)[0],
)
