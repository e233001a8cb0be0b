"""A label's row in one reading: the shift m is chosen before the row is read, so the sum needn't wait for the maximum.

With eᵢ = exp(xᵢ - m), s = Σ eᵢ over all classes except the label's, and d = m - x_y, the loss is log(1 + s e^d) for any
m. So m only has to keep the exponentials in range. For ordinary logits, m = 0 is enough, and then no xᵢ - m is rounded.
For other logits, m = x_y (the label's own logit) is mostly enough. Rows for which it is not are read again, with their
maximum as m.

Looser conditions were tried. If no s counts as too small, a label with logit -15 gets a gradient of 0 when the other
logits are -90. If m = x_y in every row, a label whose logit is 20 below the maximum has an error of 27 ulps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jce._jax.varying import vary_over, varying

# The shift is 0 if LOWEST < x_y < HIGHEST. Entries of the gradient are eᵢ/Z with Z ≥ e^x_y, and an eᵢ below 1.2e-38 is
# flushed to 0. So at x_y = -16, entries below 1.2e-38 e¹⁶ = 1e-31 are 0. For x_y ≥ 0, entries below 1.2e-38 are 0, as
# they are with m = max x. At x_y = 40, the bound 2⁶⁴ on s (`below`) is still 78 times the label's e⁴⁰.
LOWEST, HIGHEST = -16, 40


def off_known_label(at: Array, others: Callable, again: Callable, most: float) -> list[Array]:
    """m, and the results of others(m), of which s is the first, for rows whose logit at the label is `at`.

    If m = 0, s must be in [least, below), or in [0, below) if x_y ≥ 0. If m = x_y, s must be below `most`. Rows whose s
    is not in range ask to be read again. again(asks, m, s, *more) returns the numbers of all rows, with the maximum as
    m in rows that ask. In all other rows it returns the same bits as before. Rows whose s is NaN ask too: s may
    be NaN if the label's logit is -∞, and such a row must be read again.
    """
    # Flushing n entries below 2⁻¹²⁶ changes an s ≥ 2⁻⁸⁴ by at most n 2⁻⁴² times s: 2⁻²⁵ times s for n = 2¹⁷ classes.
    least, below = (2.0**-700, 2.0**600) if at.dtype == jnp.float64 else (2.0**-84, 2.0**64)

    def read_again(state):
        asks, _, *found = state
        return [asks, jnp.zeros_like(state[1]), *again(asks, *found)]

    zero = (at > LOWEST) & (at < HIGHEST)
    m = jnp.where(zero, jnp.zeros_like(at), at)
    s, *more = others(m)
    # If m = 0 and s < least, x_y is the maximum. For x_y ≥ 0, m = x_y would only make eᵢ smaller, so the row isn't read
    # again. A row whose only class is its label, such as a row that `where` masks, is one of these.
    asks = ~(s < jnp.where(zero, jnp.full_like(s, below), jnp.full_like(s, most))) | (zero & (at < 0) & (s < least))
    state = [asks, _first_of(asks), m, s, *more]
    return lax.while_loop(lambda state: state[1] > 0, read_again, state)[2:]


def at_maximum(others: Callable, maximum: Callable[[], Array]) -> Callable:
    """For rows that are cheap to sum: an `again` that sums all rows again, with the maximum as m in rows that ask."""

    def again(asks, m, *_):
        m = jnp.where(asks, maximum(), m)
        return [m, *others(m)]

    return again


@custom_vmap
def _first_of(asks):
    """The position of the first True, counted from 1, or 0 if there is none. It is used instead of `any`, which XLA
    turns into a tree of vectors on a CPU: that takes longer to compile than the rest of a label's loss."""
    none = vary_over(varying(asks), jnp.full(1, 0.5, jnp.float32))
    return lax.argmax(jnp.concatenate([*none, asks.astype(none[0].dtype).ravel()]), 0, jnp.int32)


# One flag for the whole batch. If each call in the batch had its own flag, the loop would always run, and store N × n
# numbers.
@_first_of.def_vmap
def _first_of_batch(size, batched, asks):
    return _first_of(asks), False
