"""Evaluates jaxprs, removes their unused operations, and lists the axes that they name. JAX has no public functions for
this."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax.core
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr


def results_of(jaxpr: Any, consts: Sequence[Array], arguments: Sequence[Array]) -> list[Array]:
    return jax.core.eval_jaxpr(jaxpr, consts, *arguments)


def pruned(closed: Any) -> Any:
    """The closed jaxpr, without operations on which no result depends."""
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return closed.replace(jaxpr=jaxpr)


def named_axes(effects: Collection) -> set[Hashable]:
    """The mesh axes and batch axes that an operation with these effects names, for example a `jax.lax.psum`."""
    return {e.name for e in effects if type(e).__name__ == "NamedAxisEffect"}
