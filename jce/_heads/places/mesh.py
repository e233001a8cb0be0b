"""Runs a head on several devices. Types (under Explicit axes) or the caller say how tokens and classes are split.

Inside a `jax.shard_map`, a scan over chunks of tokens sends no hidden states, and sums the head's gradient over devices
once: JAX's types say which array varies over which mesh axis, and derivatives communicate accordingly. Under Auto axes,
XLA's partitioner decides. Then hidden states stay where they are only if chunks are strided, and the head's gradient is
summed once only if the compiler moves sums over devices out of loops (`chunks.over_chunks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jce._heads.inputs import Inputs
from jce._heads.loss.function_head import FunctionHead
from jce._jax.layout import Layout, mesh_names, split_batch_axes, told_axes
from jce._jax.rows import checked_axis_name


class Places(NamedTuple):
    """The mesh axes that split the leading axes of the tokens, and the mesh axes that split the classes. Static."""

    mesh: Mesh | AbstractMesh
    tokens: P
    classes: Hashable | None
    mesh_axes: frozenset = frozenset()  # the `axis_names` of `jax.shard_map`, from `told_axes`


def by_type(inputs: Inputs) -> Places | None:
    """The places that the types of the arguments state, or None if no type says that an array is split.

    If a mesh axis splits the tokens, it is not used for the classes too: each device along it needs all classes.
    """
    tokens = Layout.of(inputs.batch, jax.tree.leaves(inputs.tokens))
    rows = [layout for x in _matrices(inputs) if (layout := Layout.of(x.shape[:1], [x])).mesh]
    mesh, taken = tokens.mesh or (rows[0].mesh if rows else None), mesh_names(*tokens.spec)
    if mesh is None:
        return None
    classes = tuple(name for name in mesh_names(*rows[0].spec) if name not in taken) if rows else ()
    return Places(mesh, P(*tokens.spec), classes or None, told_axes(mesh))


def _matrices(inputs: Inputs) -> list[Array]:
    """The arrays whose first axis is that of the classes."""
    return jax.tree.leaves([head for head in inputs.heads if not isinstance(head, FunctionHead)])


def on_each_device(
    name: str,
    function: Callable,
    inputs: Inputs,
    axis_name: Hashable | Places,
    *,
    sums: bool,
    named_classes: bool,
):
    """Calls function(inputs, mesh axes of tokens, mesh axes of classes), on each device's part if the inputs are split.

    If the results are `sums` over tokens, they are the same on all devices. Otherwise they begin with the token axes
    and are split like the tokens. With `named_classes`, the function itself names the mesh axes of the classes, so
    types must not split the classes.
    """
    if isinstance(axis_name, Places):
        _require_division(name, axis_name, inputs)
        return _on_parts(function, inputs, axis_name, None, sums)
    places, axis_name = by_type(inputs), checked_axis_name(name, axis_name, jax.tree.leaves(inputs))
    if places is not None:
        if named_classes:
            _require_whole_classes(name, places)
        return _on_parts(function, inputs, places, axis_name, sums)
    # If hidden states are split over d, they are gathered here. A head may stay split over d. If both were split, JAX
    # would raise an error: it requires an explicit sharding for the result of a matmul over a split axis.
    tokens = jax.tree.map(lambda x: Layout(x.shape, None, (None,) * x.ndim).broadcast(x), inputs.tokens)
    return function(inputs.with_tokens(tokens), (), axis_name)


def _on_parts(function: Callable, inputs: Inputs, places: Places, axis_name: Hashable | None, sums: bool):
    """Calls the function in a `jax.shard_map` over these places. If this is inside the caller's own `shard_map`, which
    splits the classes over `axis_name`, types may split each device's part of the classes again."""
    classes = mesh_names(axis_name, places.classes) or None

    def split(tree, spec, first=()):
        return jax.tree.map(
            lambda x: Layout.said((*first, *x.shape[len(first) :]), places.mesh, spec).broadcast(x), tree
        )

    of_heads = [P() if isinstance(head, FunctionHead) else P(places.classes) for head in inputs.heads]
    specs = *[places.tokens] * len(inputs.tokens), of_heads, P()
    tokens, heads = split(inputs.tokens, places.tokens, inputs.batch), list(map(split, inputs.heads, of_heads))
    return jax.shard_map(
        lambda *inputs: function(Inputs(*inputs), mesh_names(*places.tokens), classes),
        mesh=places.mesh,
        in_specs=specs,
        out_specs=P() if sums else places.tokens,
        axis_names=places.mesh_axes,
        # Until JAX no longer fails its type checks under spmd_axis_name: switch them off if a batch is split.
        check_vma=not split_batch_axes(),
    )(*tokens, heads, split(inputs.shared, P()))


def _require_whole_classes(name: str, places: Places) -> None:
    if places.classes:
        raise ValueError(
            f"{name}: with Explicit axes, heads must not be split over classes, since your function can't see this;"
            f" got classes split over {places.classes}. Use jce.on_mesh, and pass axis_name to the jce functions that"
            f" your function calls. Or undo the split with jax.sharding.reshard."
        )


def on_axes(name: str, mesh: Mesh, token_axis: Hashable | None, class_axis: Hashable | None) -> Places:
    """The places that a caller names, after a check of their mesh axes."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ValueError(
            f"{name}: mesh must be a mesh of devices, for example from jax.make_mesh; got mesh={mesh!r}. On one"
            f" device, call the function directly, without {name}."
        )
    for argument, axis in (("token_axis", token_axis), ("class_axis", class_axis)):
        if not all(isinstance(n, Hashable) and n in mesh.axis_names for n in mesh_names(axis)):
            raise ValueError(
                f"{name}: {argument} must name axes of the mesh, {mesh.axis_names} (one, or a tuple of"
                f" several), or be None; got {argument}={axis!r}."
            )
    tokens, classes = mesh_names(token_axis), mesh_names(class_axis)
    if set(tokens) & set(classes):
        raise ValueError(
            f"{name}: token_axis and class_axis must be different mesh axes: one splits the tokens, the other the"
            f" classes; got token_axis={token_axis!r} and class_axis={class_axis!r}. Pass None for one of them."
        )
    return Places(mesh, P(tokens) if tokens else P(), classes or None)


def _require_division(name: str, places: Places, inputs: Inputs) -> None:
    if not inputs.batch:
        raise ValueError(
            f"{name}: labels and hidden must have a first axis of tokens, which is split over the mesh; got a single"
            f" token. Add an axis of tokens, or call {name} without jce.on_mesh."
        )
    heads = [x.shape[0] for x in _matrices(inputs)]
    tokens, classes = mesh_names(*places.tokens), mesh_names(places.classes)
    for what, axes, lengths in (
        ("tokens, the first axis of hidden,", tokens, inputs.batch[:1]),
        ("classes, the rows of head,", classes, heads),
    ):
        devices = math.prod(places.mesh.shape[n] for n in axes)
        for length in lengths:
            if length % devices:
                raise ValueError(
                    f"{name}: the number of {what} must be a multiple of the {devices} devices of {axes}; got {length}."
                    f" Pad tokens with where=False. Pad classes with a bias of -inf, except with label smoothing,"
                    f" which counts them."
                )
