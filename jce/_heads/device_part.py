"""A device's tokens, heads and shared arrays in the form in which a loop takes them, with tokens left out.

A token that is left out, or that is padding, may reach no derivative, whatever it holds and whatever the function is.
Its cotangent is 0, but 0 · ∞ is NaN. So its arguments are replaced by those of a token that is kept, or by numbers at
which the function is known to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.kept_tokens import counts
from jce._heads.merged_batches import of_tokens
from jce._heads.places import Arguments
from jce._heads.products import Head, head_of
from jce._heads.token_loop import Inputs, Loop, token_results, weighted, weighted_sums
from jce._jax.classes import Classes
from jce._jax.layout import mesh_names, over_devices
from jce._jax.varying import vary_over, varying
from jce._numerics.mul0 import mul0


class Part(NamedTuple):
    """A device's arguments as a loop takes them. The first of `inputs.tokens` says which tokens are kept."""

    batch: tuple[int, ...]
    inputs: Inputs
    weights: Array | None
    all_kept: bool

    @classmethod
    def of(cls, name: str, parts: Arguments, class_axis, is_defined) -> Part:
        tokens, rows, shared = parts
        called, shared = shared["called"], {key: x for key, x in shared.items() if key != "called"}
        batch = tokens["hidden"][0].shape[:-1]
        count = math.prod(batch)

        def flat(x):
            rest = x.shape[len(batch) :]
            return jnp.broadcast_to(x, batch + rest).reshape(count, *rest)

        tokens = jax.tree.map(flat, tokens)
        kept, w = tokens.get("where"), tokens.get("weights")
        if w is not None:
            n = Classes(-2, class_axis).count(rows[0][0]) if called[0] is None else called[0].logits.size
            kept = _counting(tokens, w, is_defined, n) & (True if kept is None else kept)
            w = jnp.where(kept, w, jnp.zeros_like(w))
        if any(row[0].shape[0] == 0 for row in rows if row):  # `head_of` gives it a class; no token is kept
            kept = jnp.zeros(count, bool)
        every = jnp.ones(count, bool)
        hidden, heads = tokens["hidden"], [c and c.in_pairs() for c in called]
        for i, row in enumerate(rows):
            if row:
                hidden[i], heads[i] = head_of(name, hidden[i], *row)
        inputs = Inputs(hidden, [every if kept is None else kept, *tokens["others"]], heads, shared)
        axes = frozenset().union(*map(varying, jax.tree.leaves((inputs, w))))
        w = None if w is None else vary_over(axes - frozenset(mesh_names(class_axis)), w)[0]
        return cls(batch, inputs.varying_over(axes, class_axis), w, kept is None)

    def closing_over(self, arrays: Any) -> tuple[Part, Any]:
        """This part with the arrays that a function closes over, in their gradients' dtypes; and their own dtypes."""
        shared = self.inputs.shared | {"closed over": jax.tree.map(wide, arrays)}
        return self._replace(inputs=self.inputs._replace(shared=shared)), jax.tree.map(lambda x: x.dtype, arrays)

    def examples(self) -> tuple[list[Array], list[Array]]:
        """One token's logits under each head, and its other arguments: arrays of these types, to trace with."""
        pairs = zip(self.inputs.hidden, self.inputs.heads, strict=True)
        logits = [vary_over(varying(h), jnp.zeros(x.logits.shape, x.logits.dtype))[0] for h, x in pairs]
        return logits, [_first(x) for x in self.inputs.tokens[1:]]

    @property
    def logits(self) -> jax.ShapeDtypeStruct:
        """The type of one token's logits, under all heads."""
        types = [head.logits for head in self.inputs.heads]
        return jax.ShapeDtypeStruct((sum(t.size for t in types),), types[0].dtype)

    @property
    def is_bfloat16(self) -> bool:
        pairs = zip(self.inputs.hidden, self.inputs.heads, strict=True)
        return all(isinstance(x, Head) and h.dtype == x.weight.dtype == jnp.bfloat16 for h, x in pairs)

    def weights_of(self, reduction: str, token_axes: tuple, double: bool) -> Array | None:
        """The factors of the tokens' results, [N], or None where there are none."""
        w = self.weights
        if w is None and reduction == "none":
            return None
        double |= w is not None and w.dtype == jnp.float64
        w = (self.inputs.tokens[0] if w is None else w).astype(jnp.float64 if double else jnp.float32)
        return _normalized(w, token_axes) if reduction == "mean" else w

    def results(self, loop: Loop, w: Array | None, total: bool, filled: bool) -> list[Array]:
        """The results r of all tokens, or wr with weights, or with `total` Σ wr, with its gradient from one loop."""
        hidden, tokens, *whole = self.inputs
        count, all_kept = len(hidden), self.all_kept

        def inputs(arguments) -> Inputs:
            *arrays, heads, shared = arguments
            inputs = Inputs(arrays[:count], arrays[count:], heads, shared)
            return inputs if filled else _with_first(inputs, all_kept)

        def per_token(*arguments):
            return token_results(loop, inputs(arguments if all_kept else _without_nans(count, *arguments)))

        def weighted_per_token(w, *arguments):
            return [weighted(r, w) for r in per_token(*arguments)]

        def sums(w, *arguments):
            return weighted_sums(loop, w, inputs(arguments))

        if w is None:
            return of_tokens(per_token, (*hidden, *tokens), tuple(whole))
        return of_tokens(weighted_per_token, (w, *hidden, *tokens), tuple(whole), total=sums if total else None)


def _counting(tokens: Any, w: Array, is_defined: Callable | None, n: int) -> Array:
    """Which tokens count. One of weight 0 does if weights are differentiated, since the derivative in its weight is its
    loss; but not where that loss isn't defined. The first head has n classes."""
    defined = jnp.stack([jnp.isfinite(h).all(-1) for h in tokens["hidden"]]).all(0)
    if is_defined is not None:
        defined &= is_defined(tokens["others"], n)
    return counts(w) & ((w != 0) | defined)


def _normalized(w: Array, token_axes: tuple) -> Array:
    """w / Σ w, over all devices' tokens, and 0 if Σ w is 0."""
    total = over_devices(w.sum(), token_axes)
    inverse = jnp.where(total == 0, jnp.zeros_like(total), 1 / jnp.where(total == 0, jnp.ones_like(total), total))
    return mul0(jnp.broadcast_to(inverse, w.shape), w)  # so a loss of +∞ at weight 0 adds 0 to other weights' gradients


def _with_first(inputs: Inputs, all_kept: bool) -> Inputs:
    """The inputs, and in `shared["first"]` the arguments of the first token that is kept. If none is kept, these may be
    anything, so heads and shared arrays get no derivative."""
    kept, *others = inputs.tokens
    at = 0 if all_kept else jnp.argmax(kept)
    first = tuple([_first(x, at) for x in arrays] for arrays in (inputs.hidden, others))
    if not all_kept:
        any_kept = kept.any()

        # An x that is closed over and varies over fewer mesh axes than tokens do stays as it is: the select would make
        # it vary as they do.
        def still(x):
            return jnp.where(any_kept, x, lax.stop_gradient(x)) if varying(any_kept) <= varying(x) else x

        heads, shared = jax.tree.map(still, (inputs.heads, inputs.shared))
        inputs = inputs._replace(heads=heads, shared=shared)
    return inputs._replace(shared=inputs.shared | {"first": first})


def _without_nans(count: int, *arguments):
    """The arguments, 0 for tokens that aren't kept. Reverse mode saves the arguments of a function that gives a result
    for each token, and jax_debug_nans would find a NaN there."""
    kept = arguments[count]

    def cleaned(x):
        return jnp.where(expanded(kept, x), x, jnp.zeros_like(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return *map(cleaned, arguments[:-2]), *arguments[-2:]


def _first(x: Array, at: int | Array = 0) -> Array:
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        return jnp.zeros(x.shape[1:], x.dtype)
    return lax.stop_gradient(x[at])


def expanded(kept: Array, x: Array) -> Array:
    """kept, a number per token, with as many axes as x has."""
    return jnp.expand_dims(kept, range(1, x.ndim))


def wide(x: Array) -> Array:
    """x in the dtype in which a loop sums its gradient: float32 at least."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


def of_dtypes(wide: Any, dtypes: Any) -> Any:
    """A tree of arrays in the dtypes that they had before `wide`."""
    return jax.tree.map(lambda x, dtype: x if x.dtype == dtype else x.astype(dtype), wide, dtypes)
