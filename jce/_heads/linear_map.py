"""Any function of tokens and their logits, which never exist for more than a chunk of tokens."""

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
    """function(*token) of every token, where each `Linear` among the arguments is passed as the token's logits [n].

    Example:
      >>> labels, x = jnp.array([0, 2]), jce.Linear(jnp.eye(2), 20 * jnp.eye(3, 2))
      >>> print(jce.linear_map(lambda y, x: (x.argmax() == y, jce.entropy_with_logits(x)), labels, x))
      (Array([ True, False], dtype=bool), Array([8.6568456e-08, 8.6568456e-08], dtype=float32))

    It computes any loss, metric or sample of a head, written for one token as if its logits were in memory. They never
    exist for more than a chunk of tokens, in any derivative of any order. A sum or a mean of one real number per token
    costs one matrix product for each head, and three with its gradient, in one loop, whatever the function is: a chunk
    is differentiated while its logits exist. Results for each token, or several real numbers per token, cost four with
    a gradient. With `has_aux`, metrics beside the number that is trained cost no product. A head that isn't
    differentiated costs one product.

        linear_map(jce.kl_divergence_with_logits, Linear(teacher, its_head), Linear(hidden, head), reduction="mean")
        linear_map(lambda y, x: (-ce(y, x), jce.entropy_with_logits(x)), labels, Linear(hidden, head))
        linear_map(lambda y, x: x.argmax() == y, labels, Linear(hidden, head), reduction="mean")
        linear_map(jax.random.categorical, keys, Linear(hidden, head))
        linear_map(lambda y, x: (ce(y, x), {"entropy": jce.entropy_with_logits(x), "right": x.argmax() == y}),
                   labels, Linear(hidden, head), reduction="mean", has_aux=True)

    Where a sampler kept some classes, ids [..., k] padded with n, the log-probability renormalised over these:

        def kept(y, ids, x):
            return -ce(y, x, where=jnp.zeros(x.shape, bool).at[ids].set(True, mode="drop"))

    Call it under `jax.jit`, like `jax.lax.map`: outside, each call compiles it anew. It isn't jitted itself, so that no
    cache answers for a function that has changed.

    Args:
      function: a function of one token: of the arguments in their order, and then of `shared`, if that is given. It may
        use jax.numpy and jce's functions, which take the token's logits as any array [n]. Its result is an array or a
        number, or a tree of them, of any dtype. Traced values that it closes over, such as a temperature, have
        derivatives too; but with reduction="none" a `custom_vjp` or `custom_jvp` rule in it must take them as
        arguments, as in `jax.lax.map`. Prints and callbacks (`jax.debug.print`, an unordered `io_callback`) run for
        each token that takes part, in any order, and also for the padding of a chunk, which holds another token's
        arguments.
      *arguments: `jce.Linear(hidden, head)`, at least one, and arrays with the same leading token axes [...], such as
        labels, advantages, masks or random keys; or trees of them.
      where: bool, broadcast to the token axes. A token where it is False takes no part, and costs no product: function
        doesn't run on it, and its result is 0 (False).
      weights: real, broadcast to the token axes: w, by which each result is multiplied.
      reduction: "none" for each token's result r (or wr), "sum" for Σ wr, "mean" for Σ wr / Σ w, or 0 if Σ w = 0: for
        each array in the tree, over all token axes.
      shared: a tree of arrays that all tokens share, such as trained parameters. On a mesh its gradient is summed over
        devices once, after the loop, while that of a value that function closes over takes another pass.
      has_aux: a static bool: whether function gives a pair, of a real number and of metrics, a tree of anything. Only
        the number is trained: metrics have no derivative but in weights, which is exact. They are weighted and reduced
        as the number is.
      chunk_size: the number of tokens in a chunk, a static int. None for the rule of `linear_cross_entropy`.
      batch_invariant: a static bool: the same bits for a token in any batch, at a chunk_size, which must be given.
      precision: of the matrix products, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: in `jax.shard_map`, the mesh axis of the classes. With check_vma=False, a `jax.grad` inside is wrong.
        function then gets the device's part of a token's logits, and its results must be the same on all of the axis'
        devices (but JAX 0.8 can't map their sum over devices). For whole arrays use `jce.on_mesh`.

    Returns:
      The tree of function's results: with "none" arrays [..., *r.shape] of r's dtype, else of r's shape. Results that
      are summed or weighted are float32, or float64 if a real result or the weights are. Logits are float32, or float64
      if hidden, head or bias is.

    At the boundary:
      A class with bias -∞ has a logit of -∞. Padding, and tokens that are left out, reach no derivative, even where
      function is infinite or NaN there. A head without classes makes every result 0, of the shape that one class gives.

    Derivative:
      That of function, in hidden states, heads, biases, soft caps, the other arrays, weights, shared and values that
      function closes over, each in its own dtype. Forward and reverse mode, any order.

    Raises:
      TypeError: function isn't callable; an argument is no array; hidden, head or bias is not real, or `where` not
        boolean; a result that is summed or weighted is not real; with `has_aux` the result is no pair that begins with
        a number; or it holds random keys where tokens may be left out or padded: with `where`, weights or
        batch_invariant.
      ValueError: there is no Linear; shapes disagree; an option is none of those above; function names the axis of a
        `jax.vmap`, has an ordered `io_callback` or uses a `jax.Ref` of its caller's; or the classes are split and a
        result differs between their devices.
      NotImplementedError: function has a side effect that may not be repeated, such as an `io_callback`, and a
        derivative computes it again. Only the first derivative of a sum or a mean of one number per token doesn't.

    Not checked:
      Values, and where function looks up a token's logits. JAX counts an id of -1 from the end, in every mode: it is
      the last class. Where the classes are split, make ids the device's own, and move those below 0 out of range:
      i = ids - jax.lax.axis_index(axis_name) * x.size, then jnp.where(i < 0, x.size, i).

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
    """What a loop computes of a chunk: the function, traced with one token's arguments, of each of its tokens."""

    def in_order(logits, others):
        logits, others = iter(logits), iter(others)
        return [next(logits if is_one else others) for is_one in are_logits]

    def of_one(one, shared):  # a new function, so that no cache answers for one that has changed
        return function(*jax.tree.unflatten(structure, one), *shared)

    closed, results = jax.make_jaxpr(of_one, return_shape=True)(in_order(logits, others), shared)
    require_effects(name, closed.effects)
    if has_aux:
        _require_pair(name, results)
    differ = {axis for aval in closed.out_avals for axis in varying_type(aval)} & {*mesh_names(class_axis)}
    if differ:
        raise ValueError(
            f"{name}: the results of function must be the same on all devices of {class_axis!r}, over which the"
            f" classes are split; got some that differ between those of {sorted(differ)}. Give jce's functions"
            f" axis_name={class_axis!r}, or sum over the devices with jax.lax.psum."
        )
    jaxpr = closed.jaxpr  # without its arrays, which come as closed_over

    def of_chunk(logits, others, shared, closed_over):
        shared = jax.tree.leaves(shared)
        results = jax.vmap(lambda *one: evaluated(jaxpr, closed_over, [*one, *shared]))(*in_order(logits, others))
        return [results[0], *jax.lax.stop_gradient(results[1:])] if has_aux else results

    return ChunkFunction(of_chunk, results, closed.consts, has_aux, refused=undifferentiable(closed.effects))


def _require_pair(name: str, results: Any) -> None:
    """Raises unless a token's result is a pair of a number, which is trained, and metrics."""
    loss = results[0] if isinstance(results, tuple | list) and len(results) == 2 else None
    if not (isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        got = jax.tree.map(brief, results)
        raise TypeError(
            f"{name}: with has_aux, function must give a pair for a token, the number that is trained, floating-point"
            f" and of shape (), and a tree of metrics; it gives {got}. Put all but the loss into one tree."
        )
