"""The numbers of a head's loss: constants in the program if they are Python's, its arguments if traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import as_array, broadcasts_to, described, float_dtype, fraction, is_array, positive


def checked_numbers(
    function: str, label_smoothing: ArrayLike, z_loss: ArrayLike
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Smoothing and z-loss: Python's numbers, with None for a traced one; and the traced ones."""
    given = {
        "smoothing": fraction(function, jnp.result_type(float), label_smoothing=label_smoothing),
        "z_loss": positive(function, jnp.result_type(float), z_loss=z_loss, or_zero=True),
    }
    traced = {key: x for key, x in given.items() if is_array(x)}
    return given | dict.fromkeys(traced), traced


def checked_temperature(function: str, temperature: ArrayLike, batch: tuple[int, ...]) -> dict[str, Array]:
    """A temperature for each token, under its name, [...]; nothing for Python's 1."""
    if not is_array(temperature) or temperature.ndim == 0:
        if is_array(temperature):
            float_dtype(function, {"temperature": temperature})
        number = positive(function, jnp.result_type(float), temperature=temperature)
        if not is_array(number) and number == 1:
            return {}
        return {"temperature": jnp.broadcast_to(jax.device_put(number), batch)}
    got = {"temperature": as_array(function, "temperature", temperature)}
    float_dtype(function, got)
    if not broadcasts_to(batch, got["temperature"].shape):
        raise ValueError(
            f"{function}: temperature must broadcast to the token axes, {batch}; got {described(got)}. It is of tokens,"
            f" so give it no axis for classes."
        )
    return {"temperature": jnp.broadcast_to(got["temperature"], batch)}
