"""What functions of tokens under heads share: arguments read, parts on devices, tokens left out, and a reduction.

A token that is left out, or that only fills up a chunk, may reach no derivative, whatever it holds and whatever the
function is. So it holds what one that is kept does, or what the function says that it is finite at: the 0 that its
derivative is multiplied by then leaves 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._arguments import as_array, choice, described, float_dtype, is_real
from jce._classes import Classes, vary_over, varying
from jce._heads.called import Called, in_pairs, of_pairs
from jce._heads.chunks import REDUCTIONS, checked_chunk, head_of, require_choice_of_tokens, shares
from jce._heads.kept import counts
from jce._heads.linear import Linear, LinearArrays, checked_linear
from jce._heads.logits import Logits, capped
from jce._heads.places import Arguments, on_each_device
from jce._heads.products import Head, Products
from jce._heads.token_loop import Inputs, Loop, each, weighted, weighted_sums
from jce._heads.tokens import of_tokens
from jce._layout import mesh_names, over_devices


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
    """A function of a chunk's arguments, whose first axis is of tokens, of what is shared and of what it closes over.

    Its results are the leaves of a tree; `one` is that tree, with a token's shapes and dtypes.
    """

    function: Callable[[list[Array], Any, Any], list[Array]]
    one: Any
    closed_over: Any = ()
    has_aux: bool = False  # the first result alone is differentiated, a number; the function stops the others
    multiplied: bool = True  # whether it takes logits as arrays, and not as `Logits`
    halved: bool = False  # whether of bfloat16 numbers' logits it stores no more than such a number each
    filler: tuple[float, ...] | None = None  # of its other arguments, at which and at hidden states of 0 it is finite
    refused: str = ""  # its effects that a derivative may not have


def over_tokens(
    name: str,
    make: Callable[[list[Array], Any, Hashable | None], OfChunk],
    arguments: Mapping[str, Any],
    options: TokenOptions,
    shared: Any = (),
    named_classes: bool = False,
    is_defined: Callable[[list[Array], int], Array] | None = None,
) -> Any:
    """A function of each token of the arguments, `Linear` or arrays with leading token axes, reduced as options say.

    On each device it is made from a token's arguments, as examples, what is shared, and the mesh axes of the classes.
    Of tokens where it isn't defined, by all but the logits and the number of classes, a weight of 0 leaves nothing.
    """
    reduction = choice(name, reduction=options.reduction, choices=REDUCTIONS)
    chunk = checked_chunk(name, options.chunk_size, options.batch_invariant)
    products = Products.checked(name, options.precision)
    linear = {key: checked_linear(x, name, key) for key, x in arguments.items() if isinstance(x, Linear)}
    others = {key: as_array(name, key, x) for key, x in arguments.items() if key not in linear}
    batch = _checked_batch(name, linear, others)
    paths, tree = jax.tree.flatten_with_path(shared)
    shared = tree.unflatten([as_array(name, f"shared{jax.tree_util.keystr(path[1:])}", x) for path, x in paths])
    parts = Arguments(
        {"hidden": [x.hidden for x in linear.values()], "others": list(others.values())}
        | _checked_choice(name, batch, next(iter(linear.values())).classes, options),
        [None if isinstance(x.head, Called) else (x.head, x.bias) for x in linear.values()],
        {
            "caps": [x.logit_soft_cap for x in linear.values()],
            "called": [in_pairs(x.head.arrays) if isinstance(x.head, Called) else [] for x in linear.values()],
            "given": jax.tree.map(_wide, shared),
        },
    )
    called = [x.head.without_arrays if isinstance(x.head, Called) else None for x in linear.values()]

    # What a loop is made of is kept in JAX's caches: so it holds no array, and nothing that is traced.
    are_logits, dtypes = [key in linear for key in arguments], jax.tree.map(lambda x: x.dtype, shared)

    def in_order(logits, others):
        logits, others = iter(logits), iter(others)
        return [next(logits if is_one else others) for is_one in are_logits]

    def as_given(wide):
        return _of_dtypes(wide, dtypes)

    def of_part(parts, token_axes, class_axis):
        if any(called) and (token_axes or class_axis is not None):
            raise ValueError(
                f"{name}: a head that is a function is traced of whole arrays, and gives all classes; got tokens or"
                f" classes that are split, over {mesh_names(token_axes, class_axis)}. Give its matrix; or let XLA split"
                f" the tokens, under a mesh with Auto axes, or call {name} inside of a jax.shard_map over them."
            )
        part = _Part.of(name, parts, called, class_axis, is_defined)
        of_chunk = make(in_order(*part.examples()), as_given(part.inputs.shared["given"]), class_axis)
        part, dtypes_closed_over = part.closing_over(of_chunk.closed_over)
        ones, structure = jax.tree.flatten(of_chunk.one)
        if reduction != "none" or options.weights is not None:
            _require_real(name, ones)
        if chunk.filled or not part.all_kept:
            _require_zeros(name, ones)
        inexact = [i for i, x in enumerate(ones) if jnp.issubdtype(x.dtype, jnp.inexact)]
        trained = [0] if of_chunk.has_aux else inexact
        number = reduction != "none" and len(trained) == 1 and ones[trained[0]].shape == ()
        function = _of_hidden(of_chunk, called, in_order, as_given, dtypes_closed_over, products)
        loop = Loop(
            function,
            chunk,
            part.logits,
            class_axis,
            trained[0] if number else 0,
            not part.all_kept,
            of_chunk.halved and part.is_bfloat16,
            of_chunk.refused,
        )
        w = part.weights_of(reduction, token_axes, jnp.float64 in [ones[i].dtype for i in inexact])
        results = part.results(loop, w, total=number, filled=of_chunk.filler is not None)
        if reduction == "none":
            results = [x.reshape(*part.batch, *x.shape[1:]) for x in results]
        else:
            results = [over_devices(x if number else x.sum(0), token_axes) for x in results]
        return jax.tree.unflatten(structure, results)

    return on_each_device(
        name, of_part, batch, parts, options.axis_name, whole=reduction != "none", named_classes=named_classes
    )


class _Part(NamedTuple):
    """A device's arguments as a loop takes them; the first of its tokens' arrays says which tokens are kept."""

    batch: tuple[int, ...]
    inputs: Inputs
    called: list[Called | None]
    weights: Array | None
    all_kept: bool

    @classmethod
    def of(cls, name: str, parts: Arguments, called: list[Called | None], class_axis, is_defined) -> _Part:
        tokens, rows, shared = parts
        batch = tokens["hidden"][0].shape[:-1]
        count = math.prod(batch)

        def flat(x):
            rest = x.shape[len(batch) :]
            return jnp.broadcast_to(x, batch + rest).reshape(count, *rest)

        tokens = jax.tree.map(flat, tokens)
        kept, w = tokens.get("where"), tokens.get("weights")
        if w is not None:
            # A token of weight 0 still has a derivative in its weight, unless a hidden state isn't finite.
            defined = jnp.stack([jnp.isfinite(h).all(-1) for h in tokens["hidden"]]).all(0)
            if is_defined is not None:
                n = called[0].logits.size if called[0] is not None else Classes(-2, class_axis).count(rows[0][0])
                defined &= is_defined(tokens["others"], n)
            kept = counts(w) & ((w != 0) | defined) & (True if kept is None else kept)
            w = jnp.where(kept, w, jnp.zeros_like(w))
        if any(row[0].shape[0] == 0 for row in rows if row):  # no class is one, and no token has it
            kept = jnp.zeros(count, bool)
        every = jnp.ones(count, bool)
        pairs = [head_of(name, h, *row) if row else (h, None) for h, row in zip(tokens["hidden"], rows, strict=True)]
        hidden, heads = map(list, zip(*pairs, strict=True))
        inputs = Inputs(hidden, [every if kept is None else kept, *tokens["others"]], heads, shared)
        axes = frozenset().union(*map(varying, jax.tree.leaves((inputs, w))))
        w = None if w is None else vary_over(axes - frozenset(mesh_names(class_axis)), w)[0]
        return cls(batch, inputs.varying_over(axes, class_axis), called, w, kept is None)

    def closing_over(self, arrays: Any) -> tuple[_Part, Any]:
        """And the arrays' dtypes, as which they come back."""
        shared = self.inputs.shared | {"closed over": jax.tree.map(_wide, arrays)}
        return self._replace(inputs=self.inputs._replace(shared=shared)), jax.tree.map(lambda x: x.dtype, arrays)

    def examples(self) -> tuple[list[Array], list[Array]]:
        """A token's logits under each head, and its other arguments: arrays of their types, to trace with."""
        pairs = zip(self.inputs.hidden, self._types(), strict=True)
        logits = [vary_over(varying(h), jnp.zeros(t.shape, t.dtype))[0] for h, t in pairs]
        return logits, [_first(x) for x in self.inputs.tokens[1:]]

    @property
    def logits(self) -> jax.ShapeDtypeStruct:
        """A token's, under all heads."""
        types = self._types()
        return jax.ShapeDtypeStruct((sum(t.size for t in types),), types[0].dtype)

    def _types(self) -> list[jax.ShapeDtypeStruct]:
        """Of a token's logits under each head."""
        of_functions = iter([c.logits for c in self.called if c is not None])
        biases = (None if head is None else head.bias for head in self.inputs.heads)
        return [next(of_functions) if b is None else jax.ShapeDtypeStruct(b.shape, b.dtype) for b in biases]

    @property
    def is_bfloat16(self) -> bool:
        pairs = zip(self.inputs.hidden, self.inputs.heads, strict=True)
        return all(head and h.dtype == head.weight.dtype == jnp.bfloat16 for h, head in pairs)

    def weights_of(self, reduction: str, token_axes: tuple, double: bool) -> Array | None:
        """What results are multiplied by, None where there is nothing."""
        w = self.weights
        if w is None and reduction == "none":
            return None
        double |= w is not None and w.dtype == jnp.float64
        w = (self.inputs.tokens[0] if w is None else w).astype(jnp.float64 if double else jnp.float32)
        return shares(w, token_axes) if reduction == "mean" else w

    def results(self, loop: Loop, w: Array | None, total: bool, filled: bool) -> list[Array]:
        """r of all tokens, wr where there are weights, or in total Σ wr, in one loop with its gradient."""
        hidden, tokens, *whole = self.inputs
        count, all_kept = len(hidden), self.all_kept

        def inputs(arguments) -> Inputs:
            *arrays, heads, shared = arguments
            inputs = Inputs(arrays[:count], arrays[count:], heads, shared)
            return inputs if filled else _with_first(inputs, all_kept)

        def of_each(*arguments):
            return each(loop, inputs(arguments if all_kept else _without_nans(count, *arguments)))

        def weighted_of_each(w, *arguments):
            return [weighted(r, w) for r in of_each(*arguments)]

        def sums(w, *arguments):
            return weighted_sums(loop, w, inputs(arguments))

        if w is None:
            return of_tokens(of_each, (*hidden, *tokens), tuple(whole))
        return of_tokens(weighted_of_each, (w, *hidden, *tokens), tuple(whole), total=sums if total else None)


def _of_hidden(
    of_chunk: OfChunk,
    called: list[Called | None],
    in_order: Callable,
    as_given: Callable,
    closed_over: Any,
    products: Products,
) -> Callable:
    """A chunk's function of logits as one of hidden states and heads: 0 for a token that isn't kept."""

    def of_hidden(platform, inputs: Inputs) -> list[Array]:
        (kept, *others), hidden, shared = inputs.tokens, inputs.hidden, inputs.shared

        def cleaned(arrays, first):
            return [jnp.where(_column(kept, x), x, f[None]) for x, f in zip(arrays, first, strict=True)]

        if of_chunk.filler is None:
            hidden, others = map(cleaned, (hidden, others), shared["first"])
        else:  # with which tokens came, but for what isn't 0
            pairs = zip(others, of_chunk.filler, strict=False)
            others = [jnp.where(_column(kept, x), x, jnp.full_like(x, f)) if f else x for x, f in pairs]
        logits = []
        heads = [c if head is None else head for head, c in zip(inputs.heads, called, strict=True)]
        for h, head, cap, pairs in zip(hidden, heads, shared["caps"], shared["called"], strict=True):
            if isinstance(head, Head):
                x = Logits(h, head, cap, products.on(platform, h, head.weight))
                logits.append(x.whole() if of_chunk.multiplied else x)
            elif isinstance(head, Called):
                logits.append(capped(head.of_chunk(of_pairs(pairs), h), cap))
        results = of_chunk.function(
            in_order(logits, others), as_given(shared["given"]), _of_dtypes(shared["closed over"], closed_over)
        )
        if of_chunk.filler is not None:
            return results
        return [jnp.where(_column(kept, r), r, jnp.zeros_like(r)) for r in results]

    return of_hidden


def _with_first(inputs: Inputs, all_kept: bool) -> Inputs:
    """With the arguments of the first token that is kept; and if none is, nothing that is shared has a derivative."""
    kept, *others = inputs.tokens
    at = 0 if all_kept else jnp.argmax(kept)
    first = tuple([_first(x, at) for x in arrays] for arrays in (inputs.hidden, others))
    if not all_kept:
        some = kept.any()

        def still(x):  # but for what a function closes over, if it doesn't vary as tokens do
            return jnp.where(some, x, lax.stop_gradient(x)) if varying(some) <= varying(x) else x

        heads, shared = jax.tree.map(still, (inputs.heads, inputs.shared))
        inputs = inputs._replace(heads=heads, shared=shared)
    return inputs._replace(shared=inputs.shared | {"first": first})


def _without_nans(count: int, *arguments):
    """0 for what isn't kept: a derivative a token keeps its arguments, in which jax_debug_nans would find a NaN."""
    kept = arguments[count]

    def cleaned(x):
        return jnp.where(_column(kept, x), x, jnp.zeros_like(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return *map(cleaned, arguments[:-2]), *arguments[-2:]


def _first(x: Array, at: int | Array = 0) -> Array:
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        return jnp.zeros(x.shape[1:], x.dtype)
    return lax.stop_gradient(x[at])


def _column(kept: Array, x: Array) -> Array:
    return jnp.expand_dims(kept, range(1, x.ndim))


def _wide(x: Array) -> Array:
    """In which a loop sums its gradient."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


def _of_dtypes(wide: Any, dtypes: Any) -> Any:
    return jax.tree.map(lambda x, dtype: x if x.dtype == dtype else x.astype(dtype), wide, dtypes)


# Arguments


def _checked_batch(name: str, linear: Mapping[str, LinearArrays], others: Mapping[str, Array]) -> tuple[int, ...]:
    """The token axes, which all arguments have."""
    if not linear:
        raise ValueError(
            f"{name}: an argument must be a jce.Linear, hidden states and their head; got"
            f" {described(others) or 'no arguments'}. Without a head there are jax.vmap and jax.lax.map."
        )
    batch = next(iter(linear.values())).hidden.shape[:-1]
    arrays = {f"{key}.hidden": x.hidden for key, x in linear.items()}
    same = [x.shape[:-1] == batch for x in arrays.values()] + [x.shape[: len(batch)] == batch for x in others.values()]
    if not all(same):
        raise ValueError(
            f"{name}: all arguments must begin with the token axes of hidden, {batch}; got"
            f" {described(arrays | dict(others))}. What all tokens share goes into shared."
        )
    return batch


def _require_real(name: str, results: list) -> None:
    """Of a token's results, which are to be summed or weighted."""
    odd = [x for x in results if not is_real(x)]
    if odd:
        got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in odd)
        raise TypeError(
            f"{name}: what is summed or weighted must be real (floating-point, integer or bool); function gives {got}"
            f' for a token. Make real numbers of it, or ask for each with reduction="none" and no weights.'
        )


def _require_zeros(name: str, results: list) -> None:
    """Of a token's results, which are 0 for one that is left out."""
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in results):
        raise TypeError(
            f"{name}: with `where`, weights or batch_invariant function may not give random keys, of which there is"
            f" no 0 for a token that is left out. Give jax.random.key_data of them."
        )


def _checked_choice(name: str, batch: tuple[int, ...], n: int, options: TokenOptions) -> dict[str, Array]:
    """Which tokens count, and how much."""
    given = {"weights": options.weights, "where": options.where}
    got = {key: as_array(name, key, x) for key, x in given.items() if x is not None}
    require_choice_of_tokens(name, got, batch, n)
    if "weights" in got:
        got["weights"] = got["weights"].astype(float_dtype(name, {"weights": got["weights"]}))
    return got
