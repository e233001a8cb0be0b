"""The head and its loss over a mesh of devices: tokens split over one of its axes, classes over another.

Each device computes the loss of its tokens over its classes by `linear_cross_entropy`; a sum over classes is one over
devices, of a number a token. What the derivatives send follows from JAX's types of what varies over which axis: the
head's gradient is summed over the tokens' axis, once, after the loop, and the hidden states' over the classes' axis.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jce._arguments import choice, public
from jce._classes import Classes
from jce._head import tokens_and_head
from jce._linear_cross_entropy import NUMBERS, OPTIONS, REDUCTIONS, checked_options, linear_cross_entropy, shares


@public(*OPTIONS, "mesh", "token_axis", "class_axis", numbers=NUMBERS)
def sharded_linear_cross_entropy(
    labels: ArrayLike,
    hidden: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    mesh: Mesh,
    token_axis: Hashable | None,
    class_axis: Hashable | None,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
) -> Array:
    """`linear_cross_entropy`, in nats, on a mesh of devices: the same number, with nothing gathered.

    For whole arrays, under `jax.jit` or not: the first axis of labels, hidden, weights and where is split over the
    devices of `token_axis`, the classes of head and bias over those of `class_axis`. Between devices go some numbers a
    token, the hidden states' gradient (summed over the classes' axis) and, once, the head's (over the tokens').

    Args:
      labels: integer, [...], class indices y: the shape of hidden without its last axis. At least one axis.
      hidden: real, [..., d], a state for each token.
      head: real, [n, d], a row for each class, as in `linear_cross_entropy`: of a Dense layer of flax, kernel.T.
      bias: real, [n].
      mesh: the devices, as of `jax.make_mesh`. Over its other axes everything is replicated.
      token_axis: the mesh axis, or a tuple of them, over which the first axis of the tokens is split. None for none.
      class_axis: the mesh axis, or a tuple of them, over which the classes are split. None for none.
      weights: real, broadcasts to the shape of labels; of both signs, see there.
      where: bool, broadcasts to the shape of labels.
      reduction: "mean" for Σ wℓ / Σ w over all devices' tokens, "sum" or "none", as in `linear_cross_entropy`.
      label_smoothing: as there.
      z_loss: as there.
      logit_soft_cap: as there.
      chunk_size: of a device's tokens, a static int. None for the rule there, by the number of a device's classes.
      precision: as there.

    Returns:
      A number, the same on all devices, or [...] for "none", split as labels.

    At the boundary:
      As in `linear_cross_entropy`.

    Derivative:
      As there, in every mode; of whole arrays, split like the arguments.

    Raises:
      TypeError: as there.
      ValueError: as there, or the mesh has no such axis, or its devices don't divide the first axis of labels or n. Pad
        the tokens with where=False; the classes with a bias of -∞, but not with label smoothing, which counts them.

    Not checked:
      Values.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> labels, hidden, head = jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> on = {"mesh": mesh, "token_axis": "data", "class_axis": "model"}
      >>> print(jce.sharded_linear_cross_entropy(labels, hidden, head, **on))
      4.1223074e-09
    """
    name = "sharded_linear_cross_entropy"
    reduction = choice(name, reduction=reduction, choices=REDUCTIONS)
    whole, head_ = tokens_and_head(name, labels, hidden, head, bias, weights, where, Classes(-1))
    # Checked again on each device, where the error would be of another function.
    checked_options(name, Classes(-1), head_, label_smoothing, z_loss, logit_soft_cap, chunk_size, precision)
    shape = jnp.shape(labels)
    _divides(name, mesh, "token_axis", token_axis, "the first axis of labels", shape[0] if shape else 1)
    _divides(name, mesh, "class_axis", class_axis, "the number of classes, the rows of head,", jnp.shape(head)[0])
    w = (shares(whole.weights) if reduction == "mean" else whole.weights).reshape(shape)
    tokens, classes = P(token_axis), P(class_axis)
    arguments = {"labels": labels, "hidden": hidden, "weights": w, "head": head}
    specs = {"labels": tokens, "hidden": tokens, "weights": tokens, "head": classes}
    if bias is not None:
        arguments["bias"], specs["bias"] = bias, classes
    if where is not None:
        arguments["where"], specs["where"] = jnp.broadcast_to(jnp.asarray(where), shape), tokens

    def local(arguments):
        result = linear_cross_entropy(
            **arguments,
            reduction="none" if reduction == "none" else "sum",
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_soft_cap=logit_soft_cap,
            chunk_size=chunk_size,
            precision=precision,
            axis_name=class_axis,
        )
        return result if reduction == "none" or token_axis is None else lax.psum(result, token_axis)

    arrays = {key: jnp.asarray(x) for key, x in arguments.items()}
    if AxisType.Explicit in mesh.axis_types:  # where a type says how its array is split, it must say it so
        arrays = {key: jax.sharding.reshard(x, NamedSharding(mesh, specs[key])) for key, x in arrays.items()}
    out = tokens if reduction == "none" else P()
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out)(arrays)


def _divides(name: str, mesh: Mesh, argument: str, axis: Hashable | None, what: str, length: int) -> None:
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    if not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"{name}: {argument} must name axes of the mesh, {mesh.axis_names}, or be None; got {argument}={axis!r}."
        )
    devices = functools.reduce(lambda k, n: k * mesh.shape[n], names, 1)
    if length % devices:
        raise ValueError(
            f"{name}: {what} must be a multiple of the {devices} devices of {argument}={axis!r}; got {length}."
            f" Pad it: tokens with where=False, classes with a bias of -inf (which label smoothing would count)."
        )
