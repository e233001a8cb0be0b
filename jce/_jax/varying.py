"""Over which mesh axes arrays vary inside `jax.shard_map`, as their types tell; and barriers that keep it so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def varying_alike(*arrays: Array) -> list[Array]:
    """Arrays marked as varying over the mesh axes of any of them; their types tell, inside `jax.shard_map`."""
    return vary_over(frozenset().union(*map(varying, arrays)), *arrays)


def vary_over(axes: frozenset, *arrays: Array) -> list[Array]:
    missing = [tuple(sorted(axes - varying(x))) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing, strict=True)]


def like(number: Array, x: Array) -> Array:
    """The number broadcast to x's shape and marked as varying as x does. It is marked before the broadcast, so that its
    gradient is summed locally first."""
    return jnp.broadcast_to(vary_over(varying(x), number)[0], x.shape)


def barrier(tree):
    """`lax.optimization_barrier` of all arrays of a tree."""
    # Until JAX 0.11: it marks all arrays of one barrier as varying over the same mesh axes. So those that vary over
    # different axes get barriers of their own.
    arrays, structure = jax.tree.flatten(tree)
    alike = {axes: [i for i, x in enumerate(arrays) if varying(x) == axes] for axes in map(varying, arrays)}
    for places in alike.values():
        for i, x in zip(places, lax.optimization_barrier([arrays[i] for i in places]), strict=True):
            arrays[i] = x
    return jax.tree.unflatten(structure, arrays)


def varying(x: Array) -> frozenset:
    """The mesh axes over which x varies, by its type."""
    return varying_type(jax.typeof(x))


def varying_type(t) -> frozenset:
    # Until JAX 0.10: its types have `vma` instead of `manual_axis_type`.
    return t.vma if hasattr(t, "vma") else t.manual_axis_type.varying
