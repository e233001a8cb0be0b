"""The frame of all functions of heads: it reads arguments, gives each device its part, runs the loop, and reduces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.called import Called
from jce._heads.device_part import Part, expanded, of_dtypes, wide
from jce._heads.linear import Linear, checked_linear
from jce._heads.logits import Logits, capped
from jce._heads.places import Arguments, on_each_device
from jce._heads.products import Products
from jce._heads.qwix import out_of_qwix
from jce._heads.token_arguments import (
    REDUCTIONS,
    checked_batch,
    checked_choice,
    checked_chunk,
    require_real,
    require_zeros,
)
from jce._heads.token_loop import Inputs, Loop
from jce._jax.arguments import as_array, choice
from jce._jax.layout import mesh_names, over_devices
from jce._jax.platforms import ChunkSize
from jce._jax.waiting import in_a_program


class TokenOptions(NamedTuple):
    """As the public functions document them."""

    where: ArrayLike | None = None
    weights: ArrayLike | None = None
    reduction: str = "none"
    chunk_size: int | None = None
    precision: Any = None
    axis_name: Hashable | None = None
    batch_invariant: bool = False


class OfChunk(NamedTuple):
    """What a loop computes of a chunk: function(arguments, shared, closed over), whose results have the chunk's tokens
    as their first axis. They are the leaves of a tree; `one` is that tree with one token's shapes and dtypes.
    """

    function: Callable[[list[Array], Any, Any], list[Array]]
    one: Any
    closed_over: Any = ()
    has_aux: bool = False  # only the first result, a number per token, is differentiated
    multiplied: bool = True  # False: it takes `Logits`, which aren't multiplied out yet
    halved: bool = False  # with bfloat16 states and head it stores at most one bfloat16 number per logit
    filler: tuple[float, ...] | None = None  # its other arguments in padding, where it is finite at a state of 0
    refused: str = ""  # effects of it that a derivative may not repeat


@out_of_qwix
def over_tokens(
    name: str,
    make: Callable[[list[Array], Any, Hashable | None], OfChunk],
    arguments: Mapping[str, Any],
    options: TokenOptions,
    shared: Any = (),
    named_classes: bool = False,
    is_defined: Callable[[list[Array], int], Array] | None = None,
) -> Any:
    """A function of each token, reduced as the options say. Arguments are `Linear`, or arrays with leading token axes.

    On each device make(arguments of one token, shared, mesh axes of the classes) gives the function. A token where
    is_defined(arguments but the logits, number of classes) is False is left out if its weight is 0: its result may be
    NaN, and 0 times NaN would be NaN.
    """
    reduction = choice(name, reduction=options.reduction, choices=REDUCTIONS)
    chunk = checked_chunk(name, options.chunk_size, options.batch_invariant)
    products = Products.checked(name, options.precision)
    batch, parts, given = _arguments(name, arguments, shared, options)
    call = _Call(name, make, is_defined, reduction, options.weights is not None, chunk, products, given)

    def on_devices(parts):
        of_part, whole = functools.partial(_of_part, call), reduction != "none"
        return on_each_device(name, of_part, batch, parts, options.axis_name, whole=whole, named_classes=named_classes)

    # Outside of a jit, JAX would keep what it compiles for each operation of a derivative: 3 MiB a call, since a head
    # that is a function is traced anew each time. So such a call gets a jit of its own, of which JAX keeps next to
    # nothing once nobody holds it. Inside of a jit it gets none: a rule of the head's that closes over a traced value
    # would leak it.
    alone = any(parts.shared["called"]) and not in_a_program()
    return (jax.jit(on_devices) if alone else on_devices)(parts)


def _arguments(
    name: str, arguments: Mapping[str, Any], shared: Any, options: TokenOptions
) -> tuple[tuple[int, ...], Arguments, _Given]:
    """The token axes, the arguments as arrays, and how the function takes them."""
    linear = {key: checked_linear(x, name, key) for key, x in arguments.items() if isinstance(x, Linear)}
    others = {key: as_array(name, key, x) for key, x in arguments.items() if key not in linear}
    batch = checked_batch(name, linear, others)
    paths, tree = jax.tree.flatten_with_path(shared)
    shared = tree.unflatten([as_array(name, f"shared{jax.tree_util.keystr(path[1:])}", x) for path, x in paths])
    heads = list(linear.values())
    choice_of_tokens = checked_choice(name, batch, weights=options.weights, where=options.where)
    parts = Arguments(
        {"hidden": [x.hidden for x in heads], "others": list(others.values())} | choice_of_tokens,
        [() if isinstance(x.head, Called) else (x.head, x.bias) for x in heads],
        {
            "caps": [x.logit_soft_cap for x in heads],
            "called": [x.head if isinstance(x.head, Called) else None for x in heads],
            "given": jax.tree.map(wide, shared),
        },
    )
    return batch, parts, _Given([key in linear for key in arguments], jax.tree.map(lambda x: x.dtype, shared))


class _Given(NamedTuple):
    """How a function takes its arguments. It is static, and JAX's caches keep what a loop is made of: so it holds
    dtypes in place of arrays, which would be kept alive."""

    are_logits: list[bool]
    dtypes: Any  # of what is shared

    def in_order(self, logits, others) -> list:
        logits, others = iter(logits), iter(others)
        return [next(logits if is_one else others) for is_one in self.are_logits]

    def as_given(self, shared) -> Any:
        return of_dtypes(shared, self.dtypes)


class _Call(NamedTuple):
    """What is static of a call of `over_tokens`."""

    name: str
    make: Callable
    is_defined: Callable | None
    reduction: str
    weighted: bool
    chunk: ChunkSize
    products: Products
    given: _Given


def _of_part(call: _Call, parts: Arguments, token_axes: tuple, class_axis: Hashable | None) -> Any:
    """The results of the tokens in a device's part, or the weighted sums of all devices' results."""
    if any(parts.shared["called"]) and (token_axes or class_axis is not None):
        raise ValueError(
            f"{call.name}: a head that is a function is traced of whole arrays, and gives all classes; got tokens or"
            f" classes that are split, over {mesh_names(token_axes, class_axis)}. Give its matrix; or let XLA split the"
            f" tokens, under a mesh with Auto axes, or call {call.name} inside of a jax.shard_map over them."
        )
    part = Part.of(call.name, parts, class_axis, call.is_defined)
    one, shared = call.given.in_order(*part.examples()), call.given.as_given(part.inputs.shared["given"])
    of_chunk = call.make(one, shared, class_axis)
    if call.reduction != "none" or call.weighted:
        require_real(call.name, jax.tree.leaves(of_chunk.one))
    if call.chunk.filled or not part.all_kept:
        require_zeros(call.name, jax.tree.leaves(of_chunk.one))
    part, dtypes = part.closing_over(of_chunk.closed_over)
    function = _of_hidden(of_chunk, call.given, dtypes, call.products)
    return _reduced(call, part, of_chunk, function, token_axes, class_axis)


def _reduced(call: _Call, part: Part, of_chunk: OfChunk, function: Callable, token_axes, class_axis) -> Any:
    ones, structure = jax.tree.flatten(of_chunk.one)
    inexact = [i for i, x in enumerate(ones) if jnp.issubdtype(x.dtype, jnp.inexact)]
    trained = [0] if of_chunk.has_aux else inexact
    number = call.reduction != "none" and len(trained) == 1 and ones[trained[0]].shape == ()
    loop = Loop(
        function,
        call.chunk,
        part.logits,
        class_axis,
        trained[0] if number else 0,
        not part.all_kept,
        of_chunk.halved and part.is_bfloat16,
        of_chunk.refused,
    )
    w = part.weights_of(call.reduction, token_axes, jnp.float64 in [ones[i].dtype for i in inexact])
    results = part.results(loop, w, total=number, filled=of_chunk.filler is not None)
    if call.reduction == "none":
        results = [x.reshape(*part.batch, *x.shape[1:]) for x in results]
    else:
        results = [over_devices(x if number else x.sum(0), token_axes) for x in results]
    return jax.tree.unflatten(structure, results)


def _of_hidden(of_chunk: OfChunk, given: _Given, closed_over: Any, products: Products) -> Callable:
    """The chunk's function, of hidden states and heads in place of logits. It is 0 where a token isn't kept."""
    # The inner function, which JAX's caches keep, may not hold of_chunk: there may be tracers in the rest of it.
    function, multiplied, filler = of_chunk.function, of_chunk.multiplied, of_chunk.filler

    def of_hidden(platform, inputs: Inputs) -> list[Array]:
        (kept, *others), hidden, shared = inputs.tokens, inputs.hidden, inputs.shared

        def cleaned(arrays, first):
            return [jnp.where(expanded(kept, x), x, f[None]) for x, f in zip(arrays, first, strict=True)]

        if filler is None:
            hidden, others = map(cleaned, (hidden, others), shared["first"])
        else:  # padding holds zeros already: only other fillers are put in
            pairs = zip(others, filler, strict=False)
            others = [jnp.where(expanded(kept, x), x, jnp.full_like(x, f)) if f else x for x, f in pairs]
        logits = []
        for h, head, cap in zip(hidden, inputs.heads, shared["caps"], strict=True):
            if isinstance(head, Called):
                logits.append(capped(head.of_chunk(h), cap))
            else:
                x = Logits(h, head, cap, products.on(platform, h, head.weight))
                logits.append(x.whole() if multiplied else x)
        of_all = given.as_given(shared["given"]), of_dtypes(shared["closed over"], closed_over)
        results = function(given.in_order(logits, others), *of_all)
        if filler is not None:
            return results
        return [jnp.where(expanded(kept, r), r, jnp.zeros_like(r)) for r in results]

    return of_hidden
