"""Jaxprs: their results, and their operations that are needed. JAX has no public functions for these."""

from __future__ import annotations

from collections.abc import Sequence
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
