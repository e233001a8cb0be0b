"""Checks the numbers of a head's loss. Python numbers become constants in the program, traced ones its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import as_array, broadcasts_to, described, float_dtype, fraction, is_array, positive


def checked_numbers(
    name: str, label_smoothing: ArrayLike, z_loss: ArrayLike
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Smoothing and z-loss, as two dicts: Python numbers (None for a traced one), and the traced numbers."""
    given = {
        "smoothing": fraction(name, jnp.result_type(float), label_smoothing=label_smoothing),
        "z_loss": positive(name, jnp.result_type(float), z_loss=z_loss, or_zero=True),
    }
    traced = {key: x for key, x in given.items() if is_array(x)}
    return given | dict.fromkeys(traced), traced


def checked_temperature(name: str, temperature: ArrayLike, batch: tuple[int, ...]) -> dict[str, Array]:
    """A dict with one temperature per token, [...], under its name. Empty if the temperature is the Python number 1."""
    if is_array(temperature):
        float_dtype(name, {"temperature": temperature})
    if not is_array(temperature) or temperature.ndim == 0:
        t = positive(name, jnp.result_type(float), temperature=temperature)
        if not is_array(t) and t == 1:
            return {}
        t = jax.device_put(t)
    else:
        t = as_array(name, "temperature", temperature)
        if not broadcasts_to(batch, t.shape):
            raise ValueError(
                f"{name}: temperature must broadcast to the token axes, {batch}; got {described({'temperature': t})}."
                f" It has one number per token, and no axis for classes."
            )
    return {"temperature": jnp.broadcast_to(t, batch)}
