"""The functions of heads over a mesh of devices: tokens split over one of its axes, classes over another.

Each device computes its tokens' results over its classes; a sum over classes adds one number per token over devices.
JAX's types say what varies over which mesh axis, and derivatives send accordingly: a head's gradient is summed over the
tokens' axis once, after the loop, and hidden states' gradients over the classes' axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from jax.sharding import Mesh

from jce._heads.linear_cross_entropy import linear_cross_entropy
from jce._heads.linear_kl_divergence import linear_kl_divergence
from jce._heads.linear_log_probs import linear_log_probs
from jce._heads.linear_map import linear_map
from jce._heads.places.mesh import on_axes

F = TypeVar("F", bound=Callable)
FUNCTIONS = (linear_cross_entropy, linear_kl_divergence, linear_log_probs, linear_map)


def on_mesh(function: F, *, mesh: Mesh, token_axis: Hashable | None, class_axis: Hashable | None) -> F:
    """A function of heads on a mesh of devices, which returns the same numbers as the function itself.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> loss = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="data", class_axis="model")
      >>> print(loss(jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)))
      4.1223074e-09

    The function on a mesh has the signature of the given one, without axis_name. It takes whole arrays, under `jax.jit`
    or not. The first axis of hidden states, labels, weights, where and all other arrays of tokens is split over the
    devices along `token_axis`; the classes of heads and biases are split over the devices along `class_axis`; and the
    shared arrays of `linear_map` are on all devices. Nothing is gathered. Devices exchange some numbers per token, each
    hidden state's gradient (summed over the classes' axis) and, once, each head's gradient (summed over the tokens'
    axis).

    A head must be an array. A head that is a function works only where neither tokens nor classes are split, that is,
    if both axes are None; under Auto axes call the function itself, and XLA splits the tokens.

    Args:
      function: `jce.linear_cross_entropy`, `jce.linear_kl_divergence`, `jce.linear_log_probs` or `jce.linear_map`. The
        function that `linear_map` maps gets its device's classes: give jce's functions axis_name=class_axis in it. A
        traced value that it closes over may not be split, and its gradient takes another pass; so pass it as shared.
      mesh: the devices, as from `jax.make_mesh`. Over its other axes everything is replicated.
      token_axis: the mesh axis, or a tuple of axes, that splits the first axis of the tokens. None or () for none.
      class_axis: the mesh axis, or a tuple of axes, that splits the classes, none of token_axis. None or () for none.

    Returns:
      A function like the one given. Its reductions are over the tokens of all devices: "mean" is the sum over all
      tokens, divided by their total weight. The results of "mean" and "sum" are the same on all devices. A result for
      each token is split over the devices as the tokens are. Derivatives are of whole arrays, split like the arguments,
      in every mode. A chunk_size counts the tokens of one device.

    Raises:
      TypeError: function is none of those. The function on a mesh raises one if it gets an axis_name.
      ValueError: mesh is no mesh, an axis isn't one of its axes, or is both token_axis and class_axis. The function on
        a mesh raises the given function's errors, and a ValueError if the tokens have no first axis, or if the devices
        along an axis don't divide the number of classes or the first axis of the tokens. Pad tokens with where=False,
        and classes with a bias of -∞, but not with label smoothing, which counts them.

    See "Arguments of heads" in jce/README.md.
    """
    if not any(function is f for f in FUNCTIONS):
        names = ", ".join(f"jce.{f.__name__}" for f in FUNCTIONS)
        raise TypeError(
            f"on_mesh: function must be one of {names}; got {function!r}. Other functions of jce take arrays"
            f" that are split as they are."
        )
    places = on_axes("on_mesh", mesh, token_axis, class_axis)

    @functools.wraps(function)
    def on_devices(*args, **options):
        if "axis_name" in options:
            raise TypeError(
                f"{function.__name__}: on a mesh it does not take axis_name; got"
                f" axis_name={options['axis_name']!r}. Name the axis of the classes in jce.on_mesh, as class_axis."
            )
        return function(*args, axis_name=places, **options)

    return cast(F, on_devices)
