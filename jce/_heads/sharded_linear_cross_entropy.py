"""The head and its loss over a mesh of devices: tokens split over one of its axes, classes over another.

Each device computes the loss of its tokens over its classes as `linear_cross_entropy` does; a sum over classes adds one
number per token over devices. JAX's types say what varies over which mesh axis, and derivatives send accordingly: the
head's gradient is summed over the tokens' axis once, after the loop, and hidden states' over the classes' axis.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jce._heads.linear import Linear, linear_of
from jce._heads.linear_cross_entropy import NUMBERS, OPTIONS, label_cross_entropy
from jce._heads.numbers import Numbers
from jce._heads.over_tokens import TokenOptions
from jce._heads.places import on_axes
from jce._jax.public import public


@public(*OPTIONS, "mesh", "token_axis", "class_axis", numbers=NUMBERS)
def sharded_linear_cross_entropy(
    labels: ArrayLike,
    hidden: ArrayLike | Linear,
    head: ArrayLike | Callable | None = None,
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
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    precision: Any = None,
) -> Array:
    """`linear_cross_entropy`, in nats, on a mesh of devices: the same number, with nothing gathered.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> labels, hidden, head = jnp.array([0, 1]), jnp.eye(2), 20 * jnp.eye(3, 2)
      >>> on = {"mesh": mesh, "token_axis": "data", "class_axis": "model"}
      >>> print(jce.sharded_linear_cross_entropy(labels, hidden, head, **on))
      4.1223074e-09

    It takes whole arrays, under `jax.jit` or not. The first axis of labels, hidden, weights and where is split over the
    devices along `token_axis`, the classes of head and bias over those along `class_axis`. Devices exchange some
    numbers per token, the hidden states' gradient (summed over the classes' axis) and, once, the head's (summed over
    the tokens' axis).

    Args:
      labels: integer, [...], class indices y: the shape of hidden without its last axis. At least one axis.
      hidden: real, [..., d], a state for each token.
      head: real, [n, d], a row for each class: kernel.T of a flax Dense, even if n = d. A function of
        states only where neither tokens nor classes are split: `Linear`.
      bias: real, [n]. A class with bias -∞ is forbidden: it has probability 0.
      mesh: the devices, as from `jax.make_mesh`. Over its other axes everything is replicated.
      token_axis: the mesh axis, or a tuple of axes, that splits the first axis of the tokens. None or () for none.
      class_axis: the mesh axis, or a tuple of axes, that splits the classes, none of token_axis. None or () for none.
      weights: real, broadcast to the token axes: w, each token's weight. If Σ w may be 0, take reduction="sum".
      where: bool, broadcast to the token axes. A token where it is False takes no part, and costs no product.
      reduction: "mean" for Σ wℓ / Σ w over all devices' tokens, or 0 if Σ w = 0; "sum" or "none".
      label_smoothing: ε, a number from 0 to 1.
      z_loss: ζ, a number ≥ 0.
      temperature: T > 0, a number or an array of one for each token: x is then divided by T, after the soft cap.
      logit_soft_cap: c > 0, a number: x is then c tanh((hidden · headᵀ + bias)/c). None for none.
      chunk_size: the number of a device's tokens in a chunk, a static int. None for a rule, by its number of classes.
      batch_invariant: a static bool: the same bits for a token in any batch, at a chunk_size, which must be given.
      precision: of the matrix products, as in `jax.lax.dot_general`. None for JAX's setting.

    Returns:
      A number, the same on all devices, or [...] for "none", split as labels.

    At the boundary:
      As in `linear_cross_entropy`.

    Derivative:
      As there, in every mode; of whole arrays, split like the arguments.

    Raises:
      TypeError: as there.
      ValueError: as there; or mesh is no mesh, an axis isn't one of its axes, or is both token_axis and class_axis;
        labels are a scalar; or the devices along an axis don't divide n, or the first axis of labels. Pad tokens with
        where=False, and classes with a bias of -∞, but not with label smoothing, which counts them.

    Not checked:
      Values.

    See "Arguments of heads" and "Conventions" in jce/README.md.
    """
    name = "sharded_linear_cross_entropy"
    options = TokenOptions(
        where, weights, reduction, chunk_size, precision, on_axes(name, mesh, token_axis, class_axis), batch_invariant
    )
    numbers = Numbers(label_smoothing, z_loss, temperature)
    return label_cross_entropy(name, labels, linear_of(name, hidden, head, bias, logit_soft_cap), numbers, options)
