"""The temperature, which divides a head's logits: one number, or one for each token. Python's 1 costs nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jce._jax.arguments import as_array, broadcasts_to, described, float_dtype, is_array, positive
from jce._jax.classes import Classes
from jce._numerics.mul0 import over
from jce._softmax.compare import tempered


def checked_temperature(function: str, temperature: ArrayLike, batch: tuple[int, ...]) -> dict[str, Array]:
    """The temperature under its name, real and broadcasting to the token axes; nothing for Python's 1."""
    if not is_array(temperature) or temperature.ndim == 0:
        if is_array(temperature):
            float_dtype(function, {"temperature": temperature})
        number = positive(function, jnp.result_type(float), temperature=temperature)
        return {"temperature": jax.device_put(number)} if is_array(number) or number != 1 else {}
    got = {"temperature": as_array(function, "temperature", temperature)}
    float_dtype(function, got)
    if not broadcasts_to(batch, got["temperature"].shape):
        raise ValueError(
            f"{function}: temperature must broadcast to the token axes, {batch}; got {described(got)}. It is of tokens,"
            f" so give it no axis for classes."
        )
    return got


def at_temperature(x: Array, t: Array | None, classes: Classes) -> Array:
    """Tokens' logits x over t, up to a constant per row: (x - max x)/t."""
    return x if t is None else tempered(x, t.astype(x.dtype), classes)


def whole_log_sum(log_sum: Array, x: Array, t: Array | None, classes: Classes) -> Array:
    """log Σ exp x/t, where log_sum is that of the logits `at_temperature`."""
    return log_sum if t is None else log_sum + over(classes.max(lax.stop_gradient(x)), t.astype(x.dtype))
