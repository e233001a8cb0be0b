"""Any function of tokens and of their logits, which are never there for more than a chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from jce._arguments import require_bool
from jce._classes import varying_type
from jce._heads.effects import require_effects, undifferentiable
from jce._heads.linear import Linear
from jce._heads.over_tokens import OfChunk, TokenOptions, over_tokens
from jce._layout import mesh_names


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
    """function(*token) of every token, in which each `Linear` among the arguments is the token's logits [n].

    Any loss, metric or sample of a head, written for one token as if its logits were there: they never exist for more
    than a chunk of tokens, in any derivative of any order. A sum or a mean of one real number a token costs a matrix
    product a head, and with its gradient three, in one loop, whatever the function is: the logits' share of it is
    differentiated while they are there. Results for each token, or several real numbers of each, cost four with a
    gradient; metrics beside the one that is trained cost nothing, with `has_aux`. A head that isn't differentiated
    costs its one. Call it under `jax.jit`: outside, each call compiles it anew.

        linear_map(jce.kl_divergence_with_logits, Linear(teacher, its_head), Linear(hidden, head), reduction="mean")
        linear_map(lambda y, x: (-ce(y, x), jce.entropy_with_logits(x)), labels, Linear(hidden, head))
        linear_map(lambda y, x: x.argmax() == y, labels, Linear(hidden, head), reduction="mean")
        linear_map(jax.random.categorical, keys, Linear(hidden, head))
        linear_map(lambda y, x: (ce(y, x), {"entropy": jce.entropy_with_logits(x), "right": x.argmax() == y}),
                   labels, Linear(hidden, head), reduction="mean", has_aux=True)

    Of the classes that a sampler kept, ids [..., k] that are padded with n, the log-probability renormalised over them:

        def kept(y, ids, x):
            return -ce(y, x, where=jnp.zeros(x.shape, bool).at[ids].set(True, mode="drop"))

    Call it under `jax.jit`, as `jax.lax.map`: it is no jitted function itself, so that none that has changed is taken
    for what it was, and alone it is compiled anew at each call, and keeps nothing.

    Args:
      function: of one token, in the order of the arguments, and of `shared` last, where it is given. jax.numpy and
        functions of jce, which take the token's logits as any array [n]. Its result is an array or a number, or a tree
        of them, of any dtype. Traced values that it closes over, such as a temperature, have derivatives too; but under
        reduction="none" a `custom_vjp` or `custom_jvp` rule in it must take them as arguments, as in `jax.lax.map`.
        What it prints or calls (`jax.debug.print`, an unordered `io_callback`) is kept, of each token that takes part,
        in any order; and it also runs, callbacks and all, on what fills up a chunk: another token's arguments.
      *arguments: `jce.Linear(hidden, head)`, at least one, and arrays with the same leading token axes [...], such as
        labels, advantages, masks or random keys; or trees of them.
      where: bool, broadcasts to the token axes. A token where it is False takes no part, whatever it holds and whatever
        function makes of it: its result is 0 (False), with derivative 0. It costs no product, and function doesn't run
        on it, but on what fills up the last chunk: so it is in each device's part of a mesh, where devices whose
        derivatives meet in each chunk, as of a traced value that function closes over, take as many as the fullest.
      weights: real, broadcasts to the token axes: w, by which each result is multiplied. A token of weight 0 whose
        hidden state isn't finite is left out as by `where`.
      reduction: "none" for each token's result r (or wr), "sum" for Σ wr, "mean" for Σ wr / Σ w, which is 0 if Σ w is;
        of each array in the tree, over all token axes. Without weights w is 1, and 0 where `where` is False.
      shared: what all tokens share, a tree of arrays, such as parameters that are trained. Over devices its gradient is
        summed once, after the loop; that of what function closes over takes another pass on a mesh.
      has_aux: function gives a pair, of a real number and of metrics, a tree of anything. The number alone is trained:
        metrics have no derivative in hidden states, heads or any other argument, but in weights, exactly. They are
        weighted and reduced as it is.
      chunk_size: the number of tokens in a chunk, a static int. None for the rule of `linear_cross_entropy`, by the
        logits of all heads.
      batch_invariant: a static bool, as in `linear_cross_entropy`.
      precision: of the matrix products, as in `linear_cross_entropy`.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the classes of all heads are
        split: a token's logits are then the device's part of them, and function's results must be the same on all of
        its devices, as those of jce's functions with the same axis_name are (but JAX 0.8 can't map their sum over
        devices). `jce.on_mesh` is for whole arrays.

    Returns:
      The tree of function's results: for "none", of arrays [..., *r.shape] of r's dtype, else of r's shape; what is
      summed or weighted is float32, or float64 if a real result or the weights are. Logits are float32, or float64 if
      hidden, head or bias is.

    At the boundary:
      A class with bias -∞ has a logit of -∞. What fills up a chunk, and tokens that are left out, reach no derivative,
      even where function is infinite or NaN there. No tokens make a sum or a mean of 0; a head of no classes makes
      every result 0, of the shape that one class gives.

    Derivative:
      That of function, to hidden states, heads, biases and soft caps, the other arrays, weights, shared and what
      function closes over, each in its own dtype. Forward and reverse mode, any order.

    Raises:
      TypeError: function isn't callable, an argument is no array, hidden, head or bias is not real, `where` not
        boolean, a result that is summed or weighted not real, or with `has_aux` not a pair that begins with a number;
        or one holds random keys where tokens may be left out or filled up: with `where`, weights or batch_invariant.
      ValueError: there is no Linear, shapes disagree, an option is none of those above, function names the axis of a
        `jax.vmap`, has an ordered effect or uses a `jax.Ref` of its caller's, or the classes are split and a result
        still differs between their devices.
      NotImplementedError: function has an effect that `jax.checkpoint` refuses, as an `io_callback`, and a derivative
        would compute it again: any but the first of a sum or a mean of one number a token.

    Not checked:
      Values, nor where function looks up a token's logits. JAX counts an id of -1 from the end, whatever the mode: it
      is the last class. And where the classes are split, ids are to be made the device's own, and those below 0 moved
      out of range: i = ids - jax.lax.axis_index(axis_name) * x.size, and jnp.where(i < 0, x.size, i).

    Example:
      >>> labels, x = jnp.array([0, 2]), jce.Linear(jnp.eye(2), 20 * jnp.eye(3, 2))
      >>> print(jce.linear_map(lambda y, x: (x.argmax() == y, jce.entropy_with_logits(x)), labels, x))
      (Array([ True, False], dtype=bool), Array([8.6568456e-08, 8.6568456e-08], dtype=float32))
    """
    name = "linear_map"
    if not callable(function):
        raise TypeError(
            f"{name}: function must be callable; got {type(function).__name__}. It comes first, then its arguments."
        )
    require_bool(name, has_aux=has_aux)
    paths, structure = jax.tree.flatten_with_path(arguments, is_leaf=lambda x: isinstance(x, Linear))

    def make(one, shared, class_axis):
        def of_one(one, shared):  # a function of its own, so that no cache answers for one that has changed
            return function(*jax.tree.unflatten(structure, one), *shared)

        closed, results = jax.make_jaxpr(of_one, return_shape=True)(one, shared)
        require_effects(name, closed.effects)
        if has_aux:
            _require_pair(name, results)
        still = {axis for aval in closed.out_avals for axis in varying_type(aval)} & {*mesh_names(class_axis)}
        if still:
            raise ValueError(
                f"{name}: the results of function must be the same on all devices of {class_axis!r}, over which the"
                f" classes are split; got some that differ between those of {sorted(still)}. Give jce's functions"
                f" axis_name={class_axis!r}, or sum over the devices with jax.lax.psum."
            )

        jaxpr = closed.jaxpr

        def of_chunk(chunk, shared, closed_over):
            shared = jax.tree.leaves(shared)
            results = jax.vmap(lambda *one: jax.core.eval_jaxpr(jaxpr, closed_over, *one, *shared))(*chunk)
            return [results[0], *jax.lax.stop_gradient(results[1:])] if has_aux else results

        return OfChunk(of_chunk, results, closed.consts, has_aux, refused=undifferentiable(closed.effects))

    named = {f"arguments{jax.tree_util.keystr(path)}": x for path, x in paths}
    options = TokenOptions(where, weights, reduction, chunk_size, precision, axis_name, batch_invariant)
    return over_tokens(name, make, named, options, () if shared is None else (shared,), named_classes=True)


def _require_pair(name: str, results: Any) -> None:
    """Of a token: what is trained, and what is measured beside it."""
    loss = results[0] if isinstance(results, tuple | list) and len(results) == 2 else None
    if not (isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", results)
        raise TypeError(
            f"{name}: with has_aux, function must give a pair for a token, the number that is trained, floating-point"
            f" and of shape (), and a tree of metrics; it gives {got}. Put all but the loss into one tree."
        )
