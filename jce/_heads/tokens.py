"""Tokens under one head are tokens, however many axes they have: also those that `jax.vmap` adds.

Batched as it stands, a loop over chunks would take a chunk of each batch member at a time, and sum a head's gradient
for each. So a function of tokens is a primitive. Lowered or differentiated, it is what it computes; batched over the
tokens, but not over the head, it is the same function of more tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jce._waiting import Primitive

_of_tokens_p = Primitive("of_tokens")
_of_tokens_p.multiple_results = True


def of_tokens(each: Callable, tokens: tuple[Any, ...], shared: tuple, total: Callable | None = None):
    """each(*tokens, *shared), some numbers a token; or the total, which is their sum, in one loop with its gradient.

    Neither function may close over what is traced.
    """
    leaves, tree = jax.tree.flatten((tokens, shared))

    def flat(*leaves):
        tokens, shared = tree.unflatten(leaves)
        return (total or each)(*tokens, *shared)

    jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    results = _of_tokens_p.bind(*leaves, jaxpr=jaxpr, each=each, total=total, tree=tree)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _inlined(*arguments, jaxpr, **_):
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arguments)


def _run(*arguments, jaxpr, **_):
    # A function of its own, so that no cache of programs keeps what the jaxpr holds.
    return jax.jit(lambda *arguments: _inlined(*arguments, jaxpr=jaxpr))(*arguments)


def _batch(arguments, axes, *, jaxpr, each, total, tree):
    count = tree.children()[0].num_leaves
    tokens = arguments[:count]
    largest = max(range(count), key=lambda i: tokens[i].ndim - (axes[i] is not None))  # the hidden states
    if axes[largest] is None or any(axis is not None for axis in axes[count:]):
        results = jax.vmap(lambda *a: _inlined(*a, jaxpr=jaxpr), axes)(*arguments)
        return results, (0,) * len(results)
    size = tokens[largest].shape[axes[largest]]

    def merged(x, axis):
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        return x.reshape(size * x.shape[1], *x.shape[2:])

    more, shared = tree.unflatten([*map(merged, tokens, axes[:count]), *arguments[count:]])
    results = jax.tree.leaves(of_tokens(each, more, shared))
    results = [x.reshape(size, -1, *x.shape[1:]) for x in results]
    return [x.sum(1) for x in results] if total else results, (0,) * len(results)


def _differentiate(primals, tangents, *, jaxpr, **_):
    live = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_live(*values):
        arguments = list(primals)
        for i, x in zip(live, values, strict=True):
            arguments[i] = x
        return _inlined(*arguments, jaxpr=jaxpr)

    return jax.jvp(of_live, [primals[i] for i in live], [tangents[i] for i in live])


_of_tokens_p.def_impl(_run)
_of_tokens_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
ad.primitive_jvps[_of_tokens_p] = _differentiate
batching.primitive_batchers[_of_tokens_p] = _batch
mlir.register_lowering(_of_tokens_p, mlir.lower_fun(_inlined, multiple_results=True))
