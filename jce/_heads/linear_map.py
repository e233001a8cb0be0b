"""Maps a function over tokens and their logits, which exist for only one chunk of tokens at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jce._heads.arguments.effects import require_effects, undifferentiable
from jce._heads.arguments.options import Options
from jce._heads.linear import Linear
from jce._heads.loss.chunk import ChunkFunction
from jce._heads.loss.evaluated import evaluated
from jce._heads.over_tokens import over_tokens
from jce._jax.arguments import brief, require_bool
from jce._jax.layout import mesh_names
from jce._jax.varying import varying_type


def linear_map(
    function: Callable[..., Any],
    *arguments: Any,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "none",
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    precision: Any = None,
    axis_name: Hashable | None = None,
) -> Any:
    """Calls a function of one token's logits for every token, and returns each result, their sum or their mean.

    Example:
      >>> labels, x = jnp.array([0, 2]), jce.Linear(jnp.eye(2), 20 * jnp.eye(3, 2))
      >>> print(jce.linear_map(lambda y, x: (x.argmax() == y, jce.entropy_with_logits(x)), labels, x))
      (Array([ True, False], dtype=bool), Array([8.6568456e-08, 8.6568456e-08], dtype=float32))

    The function may be any loss, metric or sampler. Write it for one token, as if the token's logits [n] were in
    memory: each `Linear` among the arguments is passed as such an array. The logits exist for one chunk of tokens at a
    time, in the value and in derivatives of any order. In these examples, `ce` is
    `jce.cross_entropy_with_integer_labels`:

        linear_map(jce.kl_divergence_with_logits, Linear(teacher, its_head), Linear(hidden, head), reduction="mean")
        linear_map(lambda y, x: (-ce(y, x), jce.entropy_with_logits(x)), labels, Linear(hidden, head))
        linear_map(lambda y, x: x.argmax() == y, labels, Linear(hidden, head), reduction="mean")
        linear_map(jax.random.categorical, keys, Linear(hidden, head))
        linear_map(lambda y, x: (ce(y, x), {"entropy": jce.entropy_with_logits(x), "right": x.argmax() == y}),
                   labels, Linear(hidden, head), reduction="mean", has_aux=True)

    Without a gradient, there is one matmul per head, whatever the function computes. With a
    gradient, a sum or a mean of one real number per token costs three per head, because each chunk is differentiated
    while its logits exist. Results per token, or several real numbers per token, cost four per head with a gradient.
    With `has_aux`, the metrics cost no further matmul. A `Linear` that is not differentiated costs one matmul, or two
    if results per token are differentiated.

    Call it under `jax.jit`, like `jax.lax.map`. Outside of `jax.jit`, each call compiles it again, because the function
    may have changed.

    Args:
      function: a function of one token. It is called with the token's part of each argument, in order, and then with
        shared, if that is given. It may use jax.numpy and the functions of jce. It returns an array, a number, or a
        pytree of them, of any dtype. The function may close over traced values, such as a temperature. They have
        derivatives too. But with reduction="none", as in `jax.lax.map`, a `custom_vjp` or `custom_jvp` rule in the
        function must not close over traced values: pass them to the rule as arguments. Prints and callbacks
        (`jax.debug.print`, an unordered `io_callback`) run for each token that is not masked, in any order, and also
        for the padding of a chunk, which holds another token's arguments.
      *arguments: at least one `jce.Linear(hidden, head)`, and arrays with the same leading token axes [...], for
        example labels, advantages, masks or random keys. Or pytrees of them.
      where: bool, broadcast to the token axes. Tokens where it is False are masked: the function is not called for
        them, their result is 0 (False), their weight is 0, and they cost no matmul.
      weights: real, broadcast to the token axes: w, which multiplies each result. The default is 1.
      reduction: "none" for each token's result r (or wr), "sum" for Σ wr, "mean" for Σ wr / Σ w, which is 0 if Σ w = 0.
        The sums are over all token axes, for each array of the pytree.
      shared: a pytree of arrays that all tokens share, such as trained parameters. On a mesh, the gradient of shared is
        summed over devices once, after the loop. The gradient of a value that the function closes over takes another
        pass over the tokens, and is summed over devices in each chunk.
      has_aux: a static bool: whether the function returns a pair of a real number and metrics, which may be any
        pytree. Only the number is differentiated. Metrics are weighted and reduced like the number, and have a
        derivative only with respect to the weights.
      chunk_size: the number of tokens per chunk, a static int. None for the rule of `linear_cross_entropy`.
      batch_invariant: a static bool: whether a token's result has the same bits in every batch. It needs a chunk_size.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False, differentiate
        outside of the `shard_map`: `jax.grad` inside it returns wrong gradients. The function then gets its device's
        part of a token's logits, and its results must be the same on all devices along the axis. For global arrays, use
        `jce.on_mesh`.

    Returns:
      The pytree of the function's results. With "none", arrays [..., *r.shape] of r's dtype; otherwise arrays of r's
      shape. Sums and weighted results are float32, or float64 if a real result or the weights are float64. The logits
      are float32, or float64 if hidden, head or bias is float64.

    At the boundary:
      A class with bias -∞ has a logit of -∞. Padding and masked tokens contribute to no derivative, even if the
      function is infinite or NaN there. If a head has no classes, every result is 0, in the shape that one class
      would give.

    Derivative:
      The derivative of the function, with respect to hidden states, heads, biases, soft caps, the other arrays,
      weights, shared, and values that the function closes over, each in its own dtype. Derivatives exist in forward and
      reverse mode, to any order.

    Raises:
      TypeError: the function isn't callable; an argument is not an array; hidden, head or bias is not real; `where` is
        not boolean; a result that is summed or weighted is not real; with `has_aux`, the result is not a pair that
        begins with a number; or the result holds random keys although tokens may be masked or padded (with `where`,
        weights or batch_invariant).
      ValueError: no argument is a Linear; shapes disagree; an option has a value that is not listed above; the function
        names the axis of a `jax.vmap`, has an ordered `io_callback` or uses a `jax.Ref` of its caller; or the classes
        are split and a result differs between their devices.
      NotImplementedError: the function has a side effect that must not be repeated, such as an `io_callback`, and a
        derivative would repeat it. The first derivative of a sum or a mean of one number per token does not repeat it.

    Not checked:
      The indices at which the function looks up a token's logits. In JAX, an index of -1 means the last class, whatever
      the `mode` of `x.at[...]`. If the classes are split, subtract the index of the device's first class from each
      label, and replace negative results by x.size:

        i = labels - jax.lax.axis_index(axis_name) * x.size
        i = jnp.where(i < 0, x.size, i)

    See "Arguments of heads", "Classes split over devices" and "Conventions" in jce/README.md.
    """
    name = "linear_map"
    if not callable(function):
        raise TypeError(
            f"{name}: function must be callable; got {type(function).__name__}. It comes first, then its arguments."
        )
    require_bool(name, has_aux=has_aux)
    paths, structure = jax.tree.flatten_with_path(arguments, is_leaf=lambda x: isinstance(x, Linear))

    named = {f"arguments{jax.tree_util.keystr(path)}": x for path, x in paths}
    linear = {key: x for key, x in named.items() if isinstance(x, Linear)}
    others = {key: x for key, x in named.items() if key not in linear}
    make = functools.partial(_chunk_function, name, function, structure, [key in linear for key in named], has_aux)
    options = Options(where, weights, reduction, chunk_size, precision, axis_name, batch_invariant)
    return over_tokens(name, make, linear, others, options, () if shared is None else (shared,), named_classes=True)


def _chunk_function(
    name: str,
    function: Callable,
    structure: Any,
    are_logits: list[bool],
    has_aux: bool,
    logits,
    others,
    shared,
    class_axis,
) -> ChunkFunction:
    """The per-chunk function of the loop: it applies the function, traced with one token's arguments, to each token."""

    def in_order(logits, others):
        logits, others = iter(logits), iter(others)
        return [next(logits if is_one else others) for is_one in are_logits]

    def of_one(one, shared):  # a new function, so that no cache returns the trace of a function that has changed
        return function(*jax.tree.unflatten(structure, one), *shared)

    closed, results = jax.make_jaxpr(of_one, return_shape=True)(in_order(logits, others), shared)
    require_effects(name, closed.effects)
    if has_aux:
        _require_pair(name, results)
    differ = {axis for aval in closed.out_avals for axis in varying_type(aval)} & {*mesh_names(class_axis)}
    if differ:
        raise ValueError(
            f"{name}: the results of function must be the same on all devices of {class_axis!r}, over which the"
            f" classes are split; got results that differ along {sorted(differ)}. Give jce's functions"
            f" axis_name={class_axis!r}, or sum over the devices with jax.lax.psum."
        )
    jaxpr = closed.jaxpr  # without its constants, which `of_chunk` gets as closed_over

    def of_chunk(logits, others, shared, closed_over):
        shared = jax.tree.leaves(shared)
        results = jax.vmap(lambda *one: evaluated(jaxpr, closed_over, [*one, *shared]))(*in_order(logits, others))
        return [results[0], *jax.lax.stop_gradient(results[1:])] if has_aux else results

    return ChunkFunction(of_chunk, results, closed.consts, has_aux, refused=undifferentiable(closed.effects))


def _require_pair(name: str, results: Any) -> None:
    """Raises an error unless the result of a token is a pair: a number, which is differentiated, and metrics."""
    loss = results[0] if isinstance(results, tuple | list) and len(results) == 2 else None
    if not (isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        got = jax.tree.map(brief, results)
        raise TypeError(
            f"{name}: with has_aux, function must return a pair for each token: the number that is differentiated,"
            f" floating-point and of shape (), and a pytree of metrics; it returns {got}. Put all results except the"
            f" loss into one pytree."
        )
