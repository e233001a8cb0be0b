"""`on_mesh`: the functions of heads on a mesh of devices, with tokens split over one axis and classes over another.

Each device computes the results of its tokens over its classes. For a sum over classes, devices exchange one number per
token. JAX's types say which array varies over which mesh axis, and derivatives communicate accordingly: a head's
gradient is summed over the token axis once, after the loop, and gradients of hidden states over the class axis.
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
    """Makes a `linear_*` function run on a mesh of devices: tokens split over one mesh axis, classes over another.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> loss = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="data", class_axis="model")
      >>> print(loss(jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)))
      4.1223074e-09

    The returned function gives the same numbers as the given one. Call it with global arrays, under `jax.jit` or
    outside of it. The first axis of all arrays of tokens (hidden states, labels, weights, `where`, …) is split over
    the devices along `token_axis`. The classes of heads and biases are split over the devices along `class_axis`. The
    shared arrays of `linear_map` are replicated on all devices. No array is gathered. Devices exchange some numbers per
    token, the gradient of each hidden state (summed over the class axis) and, once, the gradient of each head (summed
    over the token axis).

    A head must be an array, unless both axes are None (nothing is split). With a head that
    is a function, call the `linear_*` function itself under a mesh with Auto axes: XLA then splits the tokens.

    Args:
      function: `jce.linear_cross_entropy`, `jce.linear_kl_divergence`, `jce.linear_log_probs` or `jce.linear_map`. A
        function that `linear_map` maps gets the logits of one device's classes: pass axis_name=class_axis to the jce
        functions that it calls. Pass traced values through `shared`. A traced value that the mapped function closes
        over must not be split over devices, and its gradient takes another pass over the tokens.
      mesh: the devices, for example from `jax.make_mesh`. Over its other axes, all arrays are replicated.
      token_axis: the mesh axis, or a tuple of axes, that splits the first axis of the tokens. None or () if the tokens
        are not split.
      class_axis: the mesh axis, or a tuple of axes, that splits the classes. It must not share an axis with token_axis.
        None or () if the classes are not split.

    Returns:
      A function with the signature of the given one, without axis_name. Its reductions are over the tokens of all
      devices: "mean" is the sum over all tokens, divided by their total weight. The results of "mean" and "sum" are the
      same on all devices. Results per token are split over the devices like the tokens. Derivatives, in forward and
      reverse mode, are global arrays, sharded like the arguments. A chunk_size counts the tokens of one device.

    Raises:
      TypeError: function is not one of these four. The returned function raises a TypeError if it gets an axis_name.
      ValueError: mesh is not a mesh, a name is not an axis of the mesh, or token_axis and class_axis share an axis. The
        returned function raises the errors of the given one. It also raises a ValueError if the tokens have no first
        axis, or if the number of classes or the length of the tokens' first axis is not a multiple of the number of
        devices that share them. Pad tokens with where=False. Pad classes with a bias of -∞, unless you use label
        smoothing, which counts them.

    See "Arguments of heads" in jce/README.md.
    """
    if not any(function is f for f in FUNCTIONS):
        names = ", ".join(f"jce.{f.__name__}" for f in FUNCTIONS)
        raise TypeError(
            f"on_mesh: function must be one of {names}; got {function!r}. Call other functions of jce directly:"
            f" they accept arrays that are split over devices."
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
