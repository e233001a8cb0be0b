"""Keeps Qwix out of loops over tokens.

While a model is called, Qwix replaces JAX's matmuls. A loop over tokens must not use the replacements: heads that are
functions are traced already, and the loop's own matmuls belong to no module.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jce._heads.linear import Linear
from jce._heads.loss.function_head import FunctionHead


@contextlib.contextmanager
def out_of_qwix(name: str, linear: Mapping[str, Linear]) -> Iterator[None]:
    """A context in which Qwix replaces nothing in this thread. Otherwise Qwix would quantize the matmuls with which a
    loop differentiates a head, and these derivatives would be off by a percent. It would also add the model's low-rank
    update to matmuls with a matrix."""
    # Qwix 0.1.8 has no public way to switch it off.
    manager: Any = getattr(sys.modules.get("qwix._src.interception"), "interception_manager", None)
    if not hasattr(manager, "disable_interception"):
        yield
        return
    replaced = manager.disable_interception()
    try:
        if replaced:
            _require_functions(name, linear)
        yield
    finally:
        manager.enable_interception(replaced)


def _require_functions(name: str, linear: Mapping[str, Linear]) -> None:
    for x in linear.values():
        if not isinstance(x.head, FunctionHead):
            raise ValueError(
                f"{name}: while Qwix replaces the matmuls of a model that is being called, head must be a function,"
                f" since Qwix doesn't see a matmul with a matrix that is passed as head; got {x!r}. Pass the head's"
                f" module, or a function such as lambda h: h @ kernel. Or let the model return jce.Linear(h, head), and"
                f" call {name} outside of the model."
            )
