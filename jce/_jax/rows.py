"""Canonicalizes rows of classes for the functions in `_quantities`: dtype, shape, axis and `where`.

Under `jax.jit`, an argument is not always an array in memory. XLA fuses the operations that compute the argument into
each pass that reads it, so each pass computes it again, with slightly different rounding. For example, XLA contracts a
product x·t and a difference after it into one fused multiply-add, and has two implementations of tanh. So two reads of
one entry may be some ulps apart, and no kernel may rely on their being equal: not by ==, by a floor, by a difference of
0 or by the rounding error of a sum. A comparison needs a margin, or must be right with either answer.
tests/test_in_program.py tests this.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import (
    as_array,
    as_floats,
    broadcasts_to,
    described,
    integer,
    joined,
    require_boolean,
)
from jce._jax.classes import Classes
from jce._jax.layout import Layout, manual_axes, mesh_names, split_batch_axes
from jce._jax.varying import varying


def elementwise(function: str, **arguments: ArrayLike) -> list[Array]:
    """The arguments as floating-point arrays of one dtype and shape."""
    arrays = as_floats(function, arguments)
    layout = Layout.of(_broadcast_shape(function, "the shapes", arguments, arrays), arrays)
    return [layout.broadcast(x) for x in arrays]


def distributions(
    function: str,
    axis: int,
    where: ArrayLike | None,
    axis_name: Hashable | None = None,
    *,
    in_logits: Collection[str] = (),
    **arguments: ArrayLike,
) -> tuple[list[Array], Classes]:
    """The arguments as floating-point arrays of one dtype and shape, and their `Classes`.

    Masked classes get probability 0: a logit of -∞ in the arguments that `in_logits` names, and 0 in the others. In a
    row of logits whose classes are all masked, the first class gets probability 1, and every function of it is then 0.
    """
    arrays, given = as_floats(function, arguments), axis
    axis = _class_axis(function, axis, arguments, arrays)
    if len({x.shape[axis] for x in arrays}) > 1:
        raise ValueError(
            f"{function}: {joined(arguments)} must have the same number of classes along axis={given}, which is never"
            f" broadcast; got {described(arguments)}. Pass the axis that holds the classes as axis=. Or pad the"
            f" classes: probabilities with 0, logits with -inf."
        )
    shape = _broadcast_shape(function, "the batch axes", arguments, arrays)
    classes = Classes(axis, checked_axis_name(function, axis_name, arrays))
    masks = [] if where is None else [_mask(function, where, shape, axis, arguments)]
    layout = Layout.of(shape, arrays + masks)
    arrays, masks = ([layout.broadcast(x) for x in xs] for xs in (arrays, masks))
    if shape[axis] == 0:  # an empty row has no maximum, so each device gets a single class, which is masked
        arrays = [jnp.zeros(jnp.expand_dims(x.sum(axis), axis).shape, x.dtype) for x in arrays]
        masks = [jnp.zeros(arrays[0].shape, bool)]
    for mask in masks:
        # The select is outside of all derivative rules. So the derivative with respect to a masked entry is exactly 0,
        # whatever the entry holds.
        arrays = [
            jnp.where(mask, x, _impossible(mask, classes, x.dtype) if name in in_logits else jnp.zeros_like(x))
            for name, x in zip(arguments, arrays, strict=True)
        ]
    return arrays, classes


def checked_axis_name(function: str, axis_name: Hashable | None, arrays: Iterable[Array]) -> Hashable | None:
    """`axis_name`, after a check that it names axes of a `jax.shard_map` around the call. If it named the axis of a
    `jax.vmap`, a gradient taken inside would be too large, by a factor of the batch size.
    """
    # Until JAX no longer fails its type checks under spmd_axis_name: it batches one operation at a time. In between,
    # only arrays that are already batched vary over the mesh axis. The error below says what to
    # do instead.
    names = mesh_names(axis_name)
    if not all(isinstance(name, Hashable) and name in manual_axes() for name in names):
        raise ValueError(
            f"{function}: axis_name must name an axis of the mesh of a jax.shard_map around the call, over which"
            f" the classes are split; got axis_name={axis_name!r}. Omit it if the classes are not split."
        )
    batch_axes = sorted(split_batch_axes(), key=str)
    if names and batch_axes and any(map(varying, arrays)):
        raise ValueError(
            f"{function}: inside a jax.vmap with spmd_axis_name, axis_name must belong to a jax.shard_map with"
            f" check_vma=False; got axis_name={axis_name!r}, and spmd_axis_name of {batch_axes}."
            f" Pass check_vma=False to the jax.shard_map and differentiate outside of it, or omit spmd_axis_name."
        )
    return axis_name


def _impossible(mask: Array, classes: Classes, dtype) -> Array:
    """Logits for masked classes: -∞, except 0 for the first class of a row whose classes are all masked."""
    first = classes.is_at(mask, classes.local(jnp.zeros(_without(mask.shape, classes.axis), jnp.int32), mask))
    nothing = ~classes.column(classes.any(mask))
    return jnp.where(first & nothing, jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[: len(shape) + axis] + shape[len(shape) + axis + 1 :]


def _broadcast_shape(function: str, what: str, arguments: Mapping[str, ArrayLike], arrays: list[Array]):
    try:
        return jnp.broadcast_shapes(*(x.shape for x in arrays))
    except ValueError:
        raise ValueError(
            f"{function}: {what} of {joined(arguments)} must broadcast; got {described(arguments)}."
            f" Add axes of length 1 where they differ, or use jax.vmap."
        ) from None


def _class_axis(function: str, axis: int, arguments: Mapping[str, ArrayLike], arrays: list[Array]) -> int:
    """`axis` of the broadcast arguments as a negative int, which has the same meaning for arrays of different rank."""
    if min(x.ndim for x in arrays) == 0:
        raise ValueError(
            f"{function}: {joined(arguments)} must have a class axis; got {described(arguments)}."
            f" Pass a number for each class. For two outcomes {{alpha, 1 - alpha}}, given by one number, use the binary"
            f" functions."
        )
    ndim = max(x.ndim for x in arrays)
    given, at = axis, integer(axis)
    if at is None:
        raise ValueError(
            f"{function}: axis must be one int; got axis={axis!r}. Name the axis that holds the classes. If there are"
            f" several such axes, reshape them into one first."
        )
    if not -ndim <= at < ndim:
        raise ValueError(
            f"{function}: axis must be from {-ndim} to {ndim - 1}; got axis={at} with {described(arguments)}."
            f" Name the axis that holds the classes."
        )
    axis = at - ndim if at >= 0 else at
    if min(x.ndim for x in arrays) < -axis:
        raise ValueError(
            f"{function}: {joined(arguments)} must each have the class axis, which is never broadcast; got axis={given}"
            f" of the broadcast shape with {described(arguments)}. Add the missing axis, or use jax.vmap."
        )
    return axis


def _mask(
    function: str, where: ArrayLike, shape: tuple[int, ...], axis: int, arguments: Mapping[str, ArrayLike]
) -> Array:
    got = {"where": where, **arguments}
    mask = as_array(function, "where", where)
    require_boolean(function, mask, got)
    if not broadcasts_to(shape, mask.shape):
        classes, rows = (shape[axis], *(1,) * (-axis - 1)), _without(shape, axis)
        of_rows = "mask[..., None]" if axis == -1 else f"jnp.expand_dims(mask, {axis})"
        raise ValueError(
            f"{function}: where must broadcast to the shape {shape} of {joined(arguments)}; got {described(got)}."
            f" A mask for classes has the shape {classes}. For a mask of rows, with shape {rows}, use where={of_rows}."
        )
    return mask
