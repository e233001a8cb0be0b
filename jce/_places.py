"""A head on several devices: each has some tokens and some classes, as types or the caller say.

Inside a `jax.shard_map`, a scan over chunks of tokens sends nothing of the hidden states, and sums the head's gradient
once: what derivatives send follows from JAX's types of what varies over which axis. Left to XLA's partitioner, under
Auto axes, that takes the right tokens in a chunk, and a compiler that moves sums out of loops (`_head.over_chunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jce._layout import Layout, mesh_names, told_axes

PER_TOKEN, PER_CLASS = ("labels", "weights", "where"), ("head", "bias")


class Places(NamedTuple):
    """The mesh axes over which the first axes of the tokens are split, and those over which the classes are: static."""

    mesh: Mesh | AbstractMesh
    tokens: P
    classes: Hashable | None
    mesh_axes: frozenset = frozenset()  # as of `told_axes`


def by_type(got: Mapping[str, Array]) -> Places | None:
    """What the types of a head's arguments say; None if they say of nothing that it is split.

    Over an axis that splits the tokens the classes are whole: each of its devices needs all.
    """
    column = {name: jnp.expand_dims(got[name], -1) for name in (*PER_TOKEN, "bias") if name in got}
    h, w = got["hidden"], got["head"]
    tokens = Layout.of(h.shape, [h, *(x for name, x in column.items() if name != "bias")]).without(-1)
    classes = Layout.of(w.shape, [w, *(x for name, x in column.items() if name == "bias")]).without(-1)
    mesh, taken = tokens.mesh or classes.mesh, mesh_names(*tokens.spec)
    if mesh is None:
        return None
    rows = tuple(name for name in mesh_names(*classes.spec) if name not in taken)
    return Places(mesh, P(*tokens.spec), rows or None, told_axes(mesh))


def on_each_device(function: Callable, places: Places | None, got: Mapping[str, Array], axis_name, *, whole: bool):
    """function(arguments, the tokens' mesh axes, the classes'), where there are places on each device's part of them.

    Its results are the same on all devices, or if not whole have a number for each token, and are split as those are.
    """
    if places is None:
        return function(got, (), axis_name)
    classes = mesh_names(axis_name, places.classes) or None  # split by the caller, and what each has again
    specs = {name: P(places.classes) if name in PER_CLASS else places.tokens for name in got}
    shapes = {name: got["labels"].shape if name in PER_TOKEN else x.shape for name, x in got.items()}
    placed = {name: Layout.said(shapes[name], places.mesh, specs[name]).place(x) for name, x in got.items()}
    return jax.shard_map(
        lambda got: function(got, mesh_names(*places.tokens), classes),
        mesh=places.mesh,
        in_specs=(specs,),
        out_specs=P() if whole else places.tokens,
        axis_names=places.mesh_axes,
    )(placed)
