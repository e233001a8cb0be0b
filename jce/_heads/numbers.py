"""The numbers of a head's cross-entropy: constants in the program if they are Python's, its arguments if traced."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._jax.arguments import fraction, is_array, positive


class Numbers(NamedTuple):
    """As `linear_cross_entropy` documents them."""

    label_smoothing: ArrayLike
    z_loss: ArrayLike
    temperature: ArrayLike

    def checked(self, name: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """Smoothing and z-loss, checked: Python's numbers, with None for a traced one; and the traced ones."""
        given = {
            "smoothing": fraction(name, jnp.result_type(float), label_smoothing=self.label_smoothing),
            "z_loss": positive(name, jnp.result_type(float), z_loss=self.z_loss, or_zero=True),
        }
        traced = {key: x for key, x in given.items() if is_array(x)}
        return given | dict.fromkeys(traced), traced
