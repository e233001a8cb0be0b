"""A head on several devices: each has some tokens and some classes, as types or the caller say.

Inside a `jax.shard_map`, a scan over chunks of tokens sends nothing of the hidden states, and sums the head's gradient
once: what derivatives send follows from JAX's types of what varies over which axis. Left to XLA's partitioner, under
Auto axes, that takes the right tokens in a chunk, and a compiler that moves sums out of loops (`chunks.over_chunks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jce._arguments import mesh_axis
from jce._layout import Layout, mesh_names, split_batch_axes, told_axes


class Places(NamedTuple):
    """The mesh axes over which the first axes of the tokens are split, and those over which the classes are: static."""

    mesh: Mesh | AbstractMesh
    tokens: P
    classes: Hashable | None
    mesh_axes: frozenset = frozenset()  # as of `told_axes`


class Arguments(NamedTuple):
    """Trees of arrays: whose first axes are the tokens', or that broadcast to these; whose first is the classes'; and
    others."""

    tokens: Any
    rows: Any
    shared: Any = ()


def by_type(batch: tuple[int, ...], arguments: Arguments) -> Places | None:
    """What the types of a head's arguments say; None if they say of nothing that it is split.

    Over an axis that splits the tokens the classes are whole: each of its devices needs all.
    """
    tokens = Layout.of(batch, jax.tree.leaves(arguments.tokens))
    rows = [layout for x in jax.tree.leaves(arguments.rows) if (layout := Layout.of(x.shape[:1], [x])).mesh]
    mesh, taken = tokens.mesh or (rows[0].mesh if rows else None), mesh_names(*tokens.spec)
    if mesh is None:
        return None
    classes = tuple(name for name in mesh_names(*rows[0].spec) if name not in taken) if rows else ()
    return Places(mesh, P(*tokens.spec), classes or None, told_axes(mesh))


def on_each_device(
    name: str,
    function: Callable,
    batch: tuple[int, ...],
    arguments: Arguments,
    axis_name: Hashable | Places,
    *,
    whole: bool,
    named_classes: bool = False,
):
    """function(arguments, the tokens' mesh axes, the classes'), where there are places on each device's part of them.

    Its results are the same on all devices, or if not whole have the tokens' axes first, and are split as those are.
    Where a function has to name the axes of its classes, types may not split them.
    """
    if isinstance(axis_name, Places):
        places, axis_name = axis_name, None
        _require_division(name, places, batch, arguments)
    else:
        places, axis_name = by_type(batch, arguments), mesh_axis(name, axis_name, jax.tree.leaves(arguments))
        if named_classes and places is not None and places.classes:
            raise ValueError(
                f"{name}: the types of the heads say that their classes are split over {places.classes}, which function"
                f" can't know. Use jce.on_mesh, and the axis_name of jce's functions in it, or jax.sharding.reshard the"
                f" heads."
            )
    if places is None:
        # Whole tokens: split over d, hidden states are gathered, and a head may stay so. Of a product of two that are
        # split over what it sums, JAX wants to be told how the result is split.
        tokens = jax.tree.map(lambda x: Layout(x.shape, None, (None,) * x.ndim).place(x), arguments.tokens)
        return function(arguments._replace(tokens=tokens), (), axis_name)
    classes = mesh_names(axis_name, places.classes) or None  # split by the caller, and what each has again
    specs = Arguments(places.tokens, P(places.classes), P())

    def placed(tree, spec, first=()):
        return jax.tree.map(lambda x: Layout.said((*first, *x.shape[len(first) :]), places.mesh, spec).place(x), tree)

    tokens, rows, shared = arguments
    return jax.shard_map(
        lambda arguments: function(arguments, mesh_names(*places.tokens), classes),
        mesh=places.mesh,
        in_specs=(specs,),
        out_specs=P() if whole else places.tokens,
        axis_names=places.mesh_axes,
        # Of a batch that is split over a mesh axis too, JAX's types tell less than it checks them for.
        check_vma=not split_batch_axes(),
    )(Arguments(placed(tokens, specs.tokens, batch), placed(rows, specs.rows), placed(shared, specs.shared)))


def on_axes(name: str, mesh: Mesh, token_axis: Hashable | None, class_axis: Hashable | None) -> Places:
    """The places that a caller says."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ValueError(
            f"{name}: mesh must be a mesh of devices, as of jax.make_mesh; got mesh={mesh!r}. On one device call the"
            f" function as it is."
        )
    for argument, axis in (("token_axis", token_axis), ("class_axis", class_axis)):
        if not all(isinstance(n, Hashable) and n in mesh.axis_names for n in mesh_names(axis)):
            raise ValueError(
                f"{name}: {argument} must name axes of the mesh, {mesh.axis_names}, one or a tuple of"
                f" them, or be None; got {argument}={axis!r}."
            )
    tokens, classes = mesh_names(token_axis), mesh_names(class_axis)
    if set(tokens) & set(classes):
        raise ValueError(
            f"{name}: token_axis and class_axis must name unlike axes of the mesh, since a device has some tokens and"
            f" some classes; got token_axis={token_axis!r} and class_axis={class_axis!r}. Give None for one of them."
        )
    return Places(mesh, P(tokens) if tokens else P(), classes or None)


def _require_division(name: str, places: Places, batch: tuple[int, ...], arguments: Arguments) -> None:
    if not batch:
        raise ValueError(
            f"{name}: labels and hidden must have a first axis of tokens, which is split over the mesh; got a single"
            f" token. Add an axis, or use the function of one device."
        )
    heads = [x.shape[0] for x in jax.tree.leaves(arguments.rows)]
    tokens, classes = mesh_names(*places.tokens), mesh_names(places.classes)
    for what, axes, lengths in (
        ("tokens, the first axis of hidden,", tokens, batch[:1]),
        ("classes, the rows of head,", classes, heads),
    ):
        devices = math.prod(places.mesh.shape[n] for n in axes)
        for length in lengths:
            if length % devices:
                raise ValueError(
                    f"{name}: the number of {what} must be a multiple of the {devices} devices of {axes}; got {length}."
                    f" Pad it: tokens with where=False, classes with a bias of -inf (which label smoothing would"
                    f" count)."
                )
