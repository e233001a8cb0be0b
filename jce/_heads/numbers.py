"""The numbers of a head's cross-entropy: part of the program where they are Python's, arrays where they are traced."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._arguments import fraction, is_array, positive


class Numbers(NamedTuple):
    """As `linear_cross_entropy` documents them."""

    label_smoothing: ArrayLike
    z_loss: ArrayLike
    temperature: ArrayLike

    def checked(self, name: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """Smoothing and z-loss, None for those that are traced; and these."""
        given = {
            "smoothing": fraction(name, jnp.result_type(float), label_smoothing=self.label_smoothing),
            "z_loss": positive(name, jnp.result_type(float), z_loss=self.z_loss, or_zero=True),
        }
        traced = {key: x for key, x in given.items() if is_array(x)}
        return given | dict.fromkeys(traced), traced
