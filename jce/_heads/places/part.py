"""Brings the tokens and heads of a device into the form in which its loop takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jce._heads.inputs import OF_CLASSES, Inputs, first_of
from jce._heads.loss.function_head import FunctionHead
from jce._heads.loss.products import Head, head_of
from jce._jax.classes import Classes
from jce._jax.layout import mesh_names
from jce._jax.primitives import primitive
from jce._jax.restricted import with_zeros
from jce._jax.varying import vary_over, varying

IsDefined = Callable[[list[Array], int], Array]


def part_of(name: str, inputs: Inputs, class_axis: Hashable | None, is_defined: IsDefined | None) -> Inputs:
    """The inputs with all tokens in one axis, a bool per token in `kept`, and heads ready for the matmul."""
    batch, count = inputs.batch, math.prod(inputs.batch)

    def flat(x):
        rest = x.shape[len(batch) :]
        return jnp.broadcast_to(x, batch + rest).reshape(count, *rest)

    hidden, others, w, kept = jax.tree.map(flat, inputs.tokens)
    if w is not None:
        counting = _counting(hidden, others, w, is_defined, _number_of_classes(inputs.heads[0], class_axis))
        kept = counting if kept is None else counting & kept
        w = jnp.where(kept, w, jnp.zeros_like(w))
    if kept is None:
        kept = jnp.ones(count, bool)
    heads = []
    for i, head in enumerate(inputs.heads):
        if isinstance(head, FunctionHead):
            heads.append(head.in_pairs())
        else:
            hidden[i], multiplied = head_of(name, hidden[i], *head)
            heads.append(multiplied)
    return _marked(Inputs(hidden, others, w, kept, heads, inputs.shared), class_axis)


def _number_of_classes(head: Any, class_axis: Hashable | None) -> int:
    return head.logits.size if isinstance(head, FunctionHead) else Classes(-2, class_axis).count(head[0])


def _marked(inputs: Inputs, class_axis: Hashable | None) -> Inputs:
    """The inputs, each marked as varying over every mesh axis over which one of them varies, since the type of a loop's
    carry can't change. Only hidden states and heads vary over the mesh axes of the classes, and they always do.

    They are marked before the loop, so gradients are summed over devices once, after the loop.
    """
    axes, classes = frozenset().union(*map(varying, jax.tree.leaves(inputs))), frozenset(mesh_names(class_axis))

    def vary(field, tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(vary_over(axes | classes if field in OF_CLASSES else axes - classes, *leaves))

    return Inputs(*map(vary, Inputs._fields, inputs))


def examples(inputs: Inputs) -> tuple[list[Array], list[Array]]:
    """Arrays to trace with, for one token: its logits under each head (zeros), and its other arguments."""
    pairs = zip(inputs.hidden, inputs.heads, strict=True)
    logits = [vary_over(varying(h), jnp.zeros(x.logits.shape, x.logits.dtype))[0] for h, x in pairs]
    return logits, [first_of(x) for x in inputs.others]


def one_tokens_logits(inputs: Inputs) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the logits of one token, with the classes of all heads counted together."""
    types = [head.logits for head in inputs.heads]
    return jax.ShapeDtypeStruct((sum(t.size for t in types),), types[0].dtype)


def are_bfloat16(inputs: Inputs) -> bool:
    pairs = zip(inputs.hidden, inputs.heads, strict=True)
    return all(isinstance(x, Head) and h.dtype == x.weight.dtype == jnp.bfloat16 for h, x in pairs)


def _counting(hidden: list[Array], others: list[Array], w: Array, is_defined: IsDefined | None, n: int) -> Array:
    """Which tokens must be computed. If weights are differentiated, this includes zero-weight tokens whose loss is
    defined, since the derivative with respect to a weight is the loss. n is the number of classes of the first head."""
    defined = jnp.stack([jnp.isfinite(h).all(-1) for h in hidden]).all(0)
    if is_defined is not None:
        defined &= is_defined(others, n)
    return counts(w) & ((w != 0) | defined)


def counts(w: Array) -> Array:
    """Whether a token of weight w must be computed: True if w ≠ 0 or if w is differentiated.

    The derivative with respect to w is the token's loss, also at w = 0. Only a JVP rule can tell whether w is
    differentiated. So `counts` is a primitive whose JVP rule returns True for all tokens.
    """
    return _counts_p.bind(w)


def _counts_rule(primals, _):
    every = counts(*primals) | True
    return every, *with_zeros([every], [])


_counts_p = primitive("counts", lambda w: w != 0, _counts_rule)
