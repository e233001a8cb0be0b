"""The effects of a function that is mapped over tokens: they are kept, or refused by an error that says what to do.

A loop's primitives declare the effects of the function that they compute (what it prints, calls or checks), so that JAX
keeps them. But many tokens are computed at once, in an order that suits the device, so effects can't be ordered.
"""

from __future__ import annotations

from collections.abc import Collection

from jce._jax.layout import manual_axes

try:  # Until JAX no longer hides which effects it orders, or refuses in jax.checkpoint (0.8 to 0.12): a private import.
    from jax._src import effects as kinds
except ImportError:  # then JAX refuses both by errors of its own
    kinds = None


def require_effects(name: str, effects: Collection) -> None:
    """Raises if an effect of a mapped function is ordered or on a `jax.Ref`, or if it names the axis of a `jax.vmap`,
    whose members' tokens all join in one loop."""
    axes = {e.name for e in effects if type(e).__name__ == "NamedAxisEffect"} - {*manual_axes()}
    if axes:
        raise ValueError(
            f"{name}: function may name no axis of a jax.vmap, since its members' tokens join in one loop; it names"
            f" {', '.join(map(repr, sorted(axes, key=str)))}. Sum over the axis outside, and pass its index as an"
            f" argument."
        )
    ordered = [e for e in effects if kinds is not None and kinds.ordered_effects.contains(e)]
    if ordered:
        raise ValueError(
            f"{name}: function may have no ordered effect, since tokens are computed many at once; it has"
            f" {_names(ordered)}. Leave out ordered=True, and pass the token's number along, or call it in a"
            f" jax.lax.map of the results."
        )
    of_refs = [e for e in effects if kinds is not None and isinstance(e, kinds.JaxprInputEffect)]
    if of_refs:
        raise ValueError(
            f"{name}: function may read or write no jax.Ref of its caller's, since tokens are computed many at once; it"
            f" has {_names(of_refs)}. Pass what it reads as an array, in shared, and return what it writes."
        )


def undifferentiable(effects: Collection) -> str:
    """The names of the effects that `jax.checkpoint` refuses to compute again in a derivative."""
    return "" if kinds is None else _names(kinds.remat_allowed_effects.filter_not_in(effects))


def require_differentiable(refused: str) -> None:
    if refused:
        raise NotImplementedError(
            f"linear_map: a derivative computes function again, as jax.checkpoint does, so it may have no {refused}"
            f" there. Take reduction='sum' or 'mean' of one number a token, whose first derivative computes it once, or"
            f" jax.debug.callback, which may be called again; or keep the call out of what is differentiated."
        )


def _names(effects: Collection) -> str:
    return ", ".join(sorted({type(e).__name__ for e in effects}))
