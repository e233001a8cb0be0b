"""The mesh axes over which arrays vary inside `jax.shard_map`, by their types. And barriers that don't change them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def varying_alike(*arrays: Array) -> list[Array]:
    """The arrays, each marked as varying over the mesh axes over which any of them varies."""
    return vary_over(frozenset().union(*map(varying, arrays)), *arrays)


def vary_over(axes: frozenset, *arrays: Array) -> list[Array]:
    missing = [tuple(sorted(axes - varying(x))) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing, strict=True)]


def like(number: Array, x: Array) -> Array:
    """The number, broadcast to the shape of x and marked as varying like x. It is marked before the broadcast, so its
    gradient is summed locally first."""
    return jnp.broadcast_to(vary_over(varying(x), number)[0], x.shape)


def barrier(tree):
    """`lax.optimization_barrier` for all arrays of a pytree."""
    # Until JAX 0.11: it marks all arrays of one barrier as varying over the same mesh axes. So arrays that vary over
    # different axes get separate barriers.
    arrays, structure = jax.tree.flatten(tree)
    alike = {axes: [i for i, x in enumerate(arrays) if varying(x) == axes] for axes in map(varying, arrays)}
    for places in alike.values():
        for i, x in zip(places, lax.optimization_barrier([arrays[i] for i in places]), strict=True):
            arrays[i] = x
    return jax.tree.unflatten(structure, arrays)


def varying(x: Array) -> frozenset:
    """The mesh axes over which x varies, according to its type."""
    return varying_type(jax.typeof(x))


def varying_type(t) -> frozenset:
    # Until JAX 0.10: its types have `vma` instead of `manual_axis_type`.
    return t.vma if hasattr(t, "vma") else t.manual_axis_type.varying
