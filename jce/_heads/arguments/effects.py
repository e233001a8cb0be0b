"""Side effects of a function that is mapped over tokens. Some are refused here; a loop keeps all others.

The primitives of a loop declare the effects of the function that they compute (prints, callbacks and checks), so that
JAX keeps these effects. Many tokens are computed at once, so JAX itself refuses an ordered `io_callback`, as under
`jax.vmap`. JAX does not export the classes of effects, so this file recognizes them by their names.
"""

from __future__ import annotations

from collections.abc import Collection

from jce._jax.jaxprs import named_axes
from jce._jax.layout import manual_axes

OF_REFS = ("ReadEffect", "WriteEffect", "AccumEffect")
REPEATED = (  # derivatives may repeat these, like `jax.checkpoint`, which refuses all callbacks except debug callbacks
    *("DebugEffect", "OrderedDebugEffect", "ErrorEffect", "ShapeAssertionEffect", "CallTfEffect"),
    *("NamedAxisEffect", "CommsEffect", "InternalMutableArrayEffect"),
)


def require_effects(name: str, effects: Collection) -> None:
    """Raises an error if a mapped function uses a `jax.Ref` of its caller, or names the axis of a `jax.vmap`. (One loop
    computes the tokens of the whole batch of that vmap.) JAX's own errors for these don't say what is wrong."""
    axes = named_axes(effects) - {*manual_axes()}
    if axes:
        raise ValueError(
            f"{name}: function must not name the axis of a jax.vmap, since one loop computes the tokens of the whole"
            f" batch; it names {', '.join(map(repr, sorted(axes, key=str)))}. Sum over the axis outside of {name}, and"
            f" pass the index along the axis as an argument."
        )
    if _names(effects) & {*OF_REFS}:
        raise ValueError(
            f"{name}: function must not read or write a jax.Ref of its caller, since many tokens are computed at once."
            f" Pass the value that it reads as an array, in shared, and return the value that it writes."
        )


def undifferentiable(effects: Collection) -> str:
    """The names of the effects that must not be repeated, although a derivative would repeat them."""
    return ", ".join(sorted(_names(effects) - {*REPEATED}))


def require_differentiable(refused: str) -> None:
    if refused:
        raise NotImplementedError(
            f"linear_map: a derivative calls function again, as jax.checkpoint does, so function must not have"
            f" the effect {refused}. Use reduction='sum' or 'mean' with one number per token, whose first derivative"
            f" calls function only once. Or use jax.debug.callback, which may be repeated. Or do not differentiate it."
        )


def _names(effects: Collection) -> set[str]:
    return {type(e).__name__ for e in effects}
