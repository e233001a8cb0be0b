"""The steps that all functions of heads share: read the arguments, then on each device loop over tokens and reduce."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.arguments.options import Options, Settings
from jce._heads.arguments.qwix import out_of_qwix
from jce._heads.arguments.read import read
from jce._heads.inputs import Inputs, in_dtypes, wide
from jce._heads.linear import Linear
from jce._heads.loop.loop import Loop
from jce._heads.loss.chunk import ChunkFunction
from jce._heads.loss.function_head import FunctionHead
from jce._heads.places.mesh import on_each_device
from jce._heads.places.part import IsDefined, are_bfloat16, examples, one_tokens_logits, part_of
from jce._jax.layout import mesh_names, over_devices
from jce._jax.waiting import in_a_program
from jce._numerics.mul0 import mul0


def over_tokens(
    name: str,
    make: Callable[[list[Array], list[Array], Any, Hashable | None], ChunkFunction],
    linear: Mapping[str, Linear],
    others: Mapping[str, ArrayLike],
    options: Options,
    shared: Any = (),
    named_classes: bool = False,
    is_defined: IsDefined | None = None,
) -> Any:
    """Applies a function to each token's logits (one array per head) and to its part of `others`, and reduces the
    results as the options say.

    On each device, make(one token's logits, its others, shared, mesh axes of the classes) returns the function. A token
    is masked if its weight is 0 and is_defined(others, number of classes) is False for it: its result may be NaN, and 0
    times NaN would be NaN. `shared` is a pytree of arrays for all tokens. With `named_classes`, the function itself
    names the mesh axes of the classes, so the types of heads must not split the classes.
    """
    settings = options.checked(name)
    inputs, dtypes = read(name, linear, others, shared, options.where, options.weights)

    def on_devices(inputs):
        on_device = functools.partial(_on_device, name, make, settings, dtypes, is_defined)
        axis_name, sums = options.axis_name, settings.sums
        return on_each_device(name, on_device, inputs, axis_name, sums=sums, named_classes=named_classes)

    # A head that is a function is traced again in each call. Outside of a jit, JAX would compile each operation of a
    # derivative separately, and keep the programs: 3 MiB per call. So a call outside of a jit gets a jit of its own.
    # When nothing refers to that jit any more, JAX frees nearly all of it. A call inside of a jit gets no jit of its
    # own: if a derivative rule in the head closed over a traced value, that value would leak.
    alone = any(isinstance(head, FunctionHead) for head in inputs.heads) and not in_a_program()
    with out_of_qwix(name, linear):
        return (jax.jit(on_devices) if alone else on_devices)(inputs)


def _on_device(
    name: str, make: Callable, settings: Settings, dtypes: Any, is_defined, inputs: Inputs, token_axes, class_axis
) -> Any:
    """The results of a device's own tokens, or the weighted sums of the results over all devices."""
    _require_matrices(name, inputs, token_axes, class_axis)
    batch, weighted = inputs.batch, inputs.weights is not None
    skips = weighted or inputs.kept is not None  # tokens may be masked
    inputs = part_of(name, inputs, class_axis, is_defined)
    chunk = make(*examples(inputs), in_dtypes(inputs.shared.given, dtypes), class_axis)
    if settings.sums or weighted:
        chunk.require_real(name)
    if settings.filled or skips:
        chunk.require_zeros(name)
    w = _factors(inputs, settings.reduction, token_axes, chunk.is_double)
    inputs = inputs.sharing(closed_over=wide(chunk.closed_over))._replace(weights=w)
    loop = _loop_of(chunk, inputs, settings, dtypes, class_axis, skips)
    results = loop.results(inputs)
    if settings.sums:
        results = [over_devices(x if loop.sums_in_loop else x.sum(0), token_axes) for x in results]
    else:
        results = [x.reshape(*batch, *x.shape[1:]) for x in results]
    return jax.tree.unflatten(jax.tree.structure(chunk.one), results)


def _loop_of(
    chunk: ChunkFunction, inputs: Inputs, settings: Settings, dtypes: Any, class_axis: Hashable | None, skips: bool
) -> Loop:
    return Loop(
        chunk.of_inputs(dtypes, settings.products),
        one_tokens_logits(inputs),
        settings.chunk_size,
        settings.filled,
        class_axis,
        trained=chunk.trained if settings.sums else None,
        skips=skips,
        takes_padding=chunk.filler is not None,
        halved=chunk.halved and are_bfloat16(inputs),
        refused=chunk.refused,
    )


def _factors(inputs: Inputs, reduction: str, token_axes: tuple, double: bool) -> Array | None:
    """The factors by which the results of tokens are multiplied, [N], or None if there are none."""
    w = inputs.weights
    if w is None and reduction == "none":
        return None
    double |= w is not None and w.dtype == jnp.float64
    w = (inputs.kept if w is None else w).astype(jnp.float64 if double else jnp.float32)
    if reduction != "mean":
        return w
    # w / Σ w over the tokens of all devices, or 0 if Σ w is 0. Because of mul0, a loss of +∞ with weight 0 adds 0 to
    # the gradients of the other weights.
    total = over_devices(w.sum(), token_axes)
    inverse = jnp.where(total == 0, jnp.zeros_like(total), 1 / jnp.where(total == 0, jnp.ones_like(total), total))
    return mul0(jnp.broadcast_to(inverse, w.shape), w)


def _require_matrices(name: str, inputs: Inputs, token_axes: tuple, class_axis: Hashable | None) -> None:
    """Raises an error if a head is a function and jce splits the tokens or the classes."""
    if (token_axes or class_axis is not None) and any(isinstance(head, FunctionHead) for head in inputs.heads):
        raise ValueError(
            f"{name}: a head that is a function is traced with whole arrays, and returns the logits of all classes, so"
            f" tokens and classes must not be split; got a split over {mesh_names(token_axes, class_axis)}. Pass the"
            f" head's matrix. Or let XLA split the tokens, under a mesh with Auto axes. Or call {name} inside of a"
            f" jax.shard_map over the tokens."
        )
