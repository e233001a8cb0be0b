"""Checks what the other functions assume without a check: that entries are ≥ 0 and sum to 1."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike

from jce._jax.arguments import is_array, is_number
from jce._jax.rows import distributions


def check_distribution(p: ArrayLike, *, axis: int = -1, atol: float | None = None) -> None:
    """Checks that `p` holds probability distributions along `axis`: entries ≥ 0 that sum to 1.

    Example:
      >>> jce.check_distribution([[0.25, 0.75], [1.0, 0.0]])

    Outside any transformation, a violation raises a ValueError. Under `jax.experimental.checkify` the check is
    among the `user_checks`. Under plain `jit`, `vmap` or `grad`, where no value is known, the call does nothing, so you
    may leave it in traced code.

    Args:
      p: real, shape [..., n, ...].
      axis: the axis of the n classes, an int.
      atol: how far a sum may be from 1. Entries below 0 are an error at any atol. The default is the square root of the
        machine epsilon of p's dtype: 3e-4 in float32, 1e-8 in float64, 9e-2 in bfloat16.

    Returns:
      None.

    Raises:
      ValueError: a row is not a distribution (the message names the worst row, its sum and its smallest entry; rows
        with a NaN count as the worst); `p` has no class axis; `axis` is not an int in range; `atol` is not a
        number ≥ 0.
      TypeError: `p` is not real.
    """
    (x,), classes = distributions("check_distribution", axis, None, p=p)
    dtype = jnp.asarray(p).dtype
    tolerance = _tolerance(atol, dtype if jnp.issubdtype(dtype, jnp.floating) else x.dtype)
    sums = classes.sum(x)
    smallest = classes.reduce(jnp.min, x)
    if sums.size == 0:
        return
    violation = jnp.nan_to_num(jnp.where(smallest < 0, jnp.inf, jnp.abs(sums - 1)), nan=jnp.inf).ravel()
    worst = violation.argmax()
    message = (
        f"check_distribution: p{{where}} is not a distribution along axis={axis}: its sum is {{sum}} and its smallest"
        f" entry {{smallest}}, with atol={tolerance:.3g}. No entry may be below 0. Normalize it, or pass a larger"
        f" atol if it is only rounded."
    )
    found = {"sum": sums.ravel()[worst], "smallest": smallest.ravel()[worst]}
    if isinstance(violation, Tracer):
        row = " (row {row} of the batch)" if sums.ndim else ""
        message = message.format(where=row, sum="{sum}", smallest="{smallest}")
        checkify.debug_check(violation[worst] <= tolerance, message, row=worst, **found)
    elif violation[worst] > tolerance:
        index = [int(i) for i in np.unravel_index(int(worst), sums.shape)]
        found = {name: f"{float(x):.9g}" for name, x in found.items()}
        raise ValueError(message.format(where=index or "", **found))


def _tolerance(atol: float | None, dtype) -> float:
    if atol is None:
        return float(jnp.finfo(dtype).eps) ** 0.5
    is_known = is_number(atol) or (is_array(atol) and atol.ndim == 0 and not isinstance(atol, Tracer))
    if not (is_known and atol >= 0):
        raise ValueError(
            f"check_distribution: atol must be a number ≥ 0; got atol={atol!r}. Omit atol for the default."
        )
    return float(atol)
