"""A label's row in one reading: its shift is known before the row is read, so that nobody waits for the maximum.

With eᵢ = exp(xᵢ - m), s = Σ eᵢ over all classes but the label's and d = m - x_y, the loss is log(1 + s e^d) for any m:
the maximum only keeps the exponentials in range. Of ordinary logits 0 does that too, and then no xᵢ - m is rounded.
Elsewhere the label's own logit mostly does. Rows in which neither does are read again, with their maximum.

What looser conditions cost: where no s is too small, a label at -15 beside others at -90 has a gradient of 0; the
label's logit as every row's shift loses 27 ulps where the label is 20 below the maximum.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jce._classes import vary_over, varying

# Labels' logits between which the shift is 0. At the lower, entries of the gradient below 1e-31 are 0, and at logits
# above 0 those below 1e-38, as with the maximum; at the higher no s has to be smaller than a float is.
LOWEST, HIGHEST = -16, 40


def off_known_label(at: Array, others: Callable, again: Callable, most: float) -> list[Array]:
    """m, and what others(m) returns, first of all s, for rows that have `at` at their label; `most` bounds s at x_y.

    That of rows which ask for it is read again: by again(asks, m, s, *more), the same numbers for all rows, and for
    those that ask of their maximum. It changes no other's bits. A row that is NaN asks, as one of a label of -∞ must.
    """
    least, below = (2.0**-700, 2.0**600) if at.dtype == jnp.float64 else (2.0**-84, 2.0**64)

    def read_again(state):
        asks, _, *found = state
        return [asks, jnp.zeros_like(state[1]), *again(asks, *found)]

    zero = (at > LOWEST) & (at < HIGHEST)
    m = jnp.where(zero, jnp.zeros_like(at), at)
    s, *more = others(m)
    # With s so small the label is the maximum. If it is 0 or more, shifted by it no less would underflow: so a row that
    # has nothing but its label, as one that `where` drops, isn't read again.
    asks = ~(s < jnp.where(zero, jnp.full_like(s, below), jnp.full_like(s, most))) | (zero & (at < 0) & (s < least))
    state = [asks, _first_of(asks), m, s, *more]
    return lax.while_loop(lambda state: state[1] > 0, read_again, state)[2:]


def at_maximum(others: Callable, maximum: Callable[[], Array]) -> Callable:
    """All rows once more, where they are cheap: those that ask with their maximum as the shift."""

    def again(asks, m, *_):
        m = jnp.where(asks, maximum(), m)
        return [m, *others(m)]

    return again


@custom_vmap
def _first_of(asks):
    """The number of the first that is True, from 1, and 0 of none. Not `any`: of that XLA on a CPU makes a tree of
    vectors, which takes longer to compile than all else of a label's loss."""
    none = vary_over(varying(asks), jnp.full(1, 0.5, jnp.float32))
    return lax.argmax(jnp.concatenate([*none, asks.astype(none[0].dtype).ravel()]), 0, jnp.int32)


# Of the whole batch: a flag for each of its calls would make a loop that always runs, and keeps N × n numbers.
@_first_of.def_vmap
def _first_of_batch(size, batched, asks):
    return _first_of(asks), False
