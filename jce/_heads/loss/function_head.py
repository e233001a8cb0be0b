"""A head that is a function: its trace for the state of one token, and the arrays that it closes over.

The head is traced once, with the state of one token, in the call to which it is passed. This has three consequences:

- The head is applied to each token separately, whatever the chunks are.
- JAX's settings at that call, and patches of JAX, also hold in derivatives, which use the same trace.
- The arrays that the head closes over take the place of a matrix: they are differentiated, and their gradients are
  summed over chunks.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._heads.inputs import is_narrow
from jce._heads.loss.evaluated import evaluated
from jce._jax.arguments import as_array, brief, float_dtype
from jce._jax.jaxprs import named_axes
from jce._jax.varying import vary_over, varying

RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionHead:
    """A traced head: a pytree whose leaves are the arrays that it closes over. A loop takes it `in_pairs`."""

    arrays: list[Any]
    jaxpr: Any = dataclasses.field(metadata={"static": True})
    rank: int = dataclasses.field(metadata={"static": True})  # of the state with which it was traced
    logits: jax.ShapeDtypeStruct = dataclasses.field(metadata={"static": True})  # of one token

    @classmethod
    def of(cls, name: str, head: Callable, hidden: Any, bias: Any) -> FunctionHead:
        if bias is not None:
            raise ValueError(
                f"{name}: a head that is a function adds its own bias, so bias must be None; got both. Pass"
                f" lambda h: head(h) + bias as head."
            )
        h = as_array(name, "hidden", hidden)
        float_dtype(name, {"hidden": h})
        rank = max(h.ndim, 1)
        token = jax.ShapeDtypeStruct((1,) * (rank - 1) + h.shape[-1:], h.dtype)
        closed, given = jax.make_jaxpr(lambda token: head(*vary_over(varying(h), token)), return_shape=True)(token)
        are_logits = isinstance(given, jax.ShapeDtypeStruct) and given.shape[:-1] == token.shape[:-1]
        if not (are_logits and given.ndim == rank and given.size and jnp.issubdtype(given.dtype, jnp.floating)):
            raise ValueError(
                f"{name}: head must return floating-point logits, with the axes of the hidden states and the classes in"
                f" place of the last axis; called with {brief(token)}, the state of one token, it returns"
                f" {jax.tree.map(brief, given)}. Pass a function such as lambda h: h @ kernel."
            )
        _require_of_each_token(name, closed)
        dtype = given.dtype
        if dtype.itemsize < 4:
            warnings.warn(
                f"{name}: head returns {dtype} logits, whose rounding errors reach losses and gradients. Let the matmul"
                f" accumulate and return float32: jnp.matmul(..., preferred_element_type=jnp.float32).",
                stacklevel=_outside_jce(),
            )
            dtype = jnp.dtype(jnp.float32)
        arrays = [jnp.asarray(x) for x in closed.consts]
        return cls(arrays, closed.jaxpr, rank, jax.ShapeDtypeStruct(given.shape[-1:], dtype))

    def in_pairs(self) -> FunctionHead:
        """Pairs each half-precision array with its float32 copy, so that a loop sums the array's gradient in float32.
        No operation reads the copy: it only receives the gradient."""

        def pair(x):
            return (lax.stop_gradient(x), x.astype(jnp.float32)) if is_narrow(x) else (x, None)

        return dataclasses.replace(self, arrays=[pair(x) for x in self.arrays])

    def logits_of(self, h: Array) -> Array:
        """The logits [C, n] for states [C, d]. The head must be `in_pairs`."""
        arrays = [x if wide is None else _with_gradient_at(x, wide) for x, wide in self.arrays]

        def of_token(h):
            (x,) = evaluated(self.jaxpr, arrays, [h.reshape((1,) * (self.rank - 1) + h.shape)])
            return x.reshape(self.logits.shape).astype(self.logits.dtype)

        return jax.vmap(of_token)(h)


@jax.custom_jvp
def _with_gradient_at(x: Array, wide: Array) -> Array:
    return x


@_with_gradient_at.defjvp
def _with_gradient_at_rule(primals, tangents):
    return _with_gradient_at(*primals), tangents[1].astype(primals[0].dtype)


def _outside_jce() -> int:
    """The `stacklevel` with which `warnings.warn`, called by the caller, names the first line outside of jce."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("jce."):
        frame, level = frame.f_back, level + 1
    return level


def _require_of_each_token(name: str, closed: Any) -> None:
    """Raises an error if the trace draws random numbers, which would be the same for all tokens, or has a side effect.
    The trace of one token doesn't show other ways in which the function may depend on other tokens."""
    drawn = sorted({e.primitive.name for e in _equations(closed.jaxpr)} & {*RANDOM})
    if drawn:
        raise ValueError(
            f"{name}: head must not draw random numbers: it is traced for one token, so all tokens would get the same"
            f" numbers; it has {', '.join(drawn)}. Draw them outside of head, for example to multiply the hidden states"
            f" by a dropout mask."
        )
    axes = sorted(map(str, named_axes(closed.effects)))
    if axes:
        raise ValueError(
            f"{name}: head must not communicate along a named axis, since derivatives recompute it; it names"
            f" {', '.join(axes)}. Communicate before the call: gather the hidden states or weights that head needs with"
            f" jax.lax.all_gather(..., tiled=True). If the classes are split, pass the head's matrix and axis_name."
        )
    if closed.effects:
        raise ValueError(
            f"{name}: head must not have a side effect, since derivatives recompute it; it has"
            f" {', '.join(sorted({type(e).__name__ for e in closed.effects}))}. Remove prints, callbacks and writes."
        )


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
