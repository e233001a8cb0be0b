"""The loss of a label in one pass over its row: the shift m is chosen first, so the sum needn't wait for the maximum.

With eᵢ = exp(xᵢ - m), s = Σ eᵢ over all classes except the label y, and d = m - x_y, the loss is log(1 + s e^d) for any
m. So m only has to keep the exponentials in range. For ordinary logits, m = 0 is enough, and then no xᵢ - m is rounded.
For other logits, m = x_y (the label's own logit) is mostly enough. If neither is enough for some row, all rows get a
second pass, in which m is the maximum for such rows.

Both bounds on s are needed. Without the lower one, a label with logit -15 would get a gradient of 0 when the other
logits are -90. Without the upper one (`most`), a label whose logit is 20 below the maximum would have an error of 27
ulps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jce._jax.varying import vary_over, varying

# The shift m is 0 if LOWEST < x_y < HIGHEST. Entries of the gradient are eᵢ/Z with Z ≥ e^x_y, and XLA flushes an eᵢ
# below 1.2e-38 to 0. So at x_y = -16, entries below 1.2e-38 e¹⁶ = 1e-31 are 0. For x_y ≥ 0, entries below 1.2e-38 are
# 0, as they are with m = max x. At x_y = 40, the bound 2⁶⁴ on s (`below`) is still 78 times the label's e⁴⁰.
LOWEST, HIGHEST = -16, 40


def off_known_label(at: Array, others: Callable, second_pass: Callable, most: float) -> list[Array]:
    """m and the results of others(m), after a second pass if one is needed. `at` is x_y, the label's logit, per row.

    others(m) returns a list: s, and any further results. In a row with m = 0, s must be in [least, below), or in
    [0, below) if x_y ≥ 0. In a row with m = x_y, s must be below `most`. Otherwise, and also if s is NaN, the row needs
    a second pass. (s may be NaN if x_y is -∞.) `redo` marks such rows.

    second_pass(redo, m, s, *more) does the second pass over all rows. It returns the same list [m, s, *more], with the
    maximum as m in the rows that `redo` marks, and with the same bits as before in all others.
    """
    # Flushing n entries below 2⁻¹²⁶ changes an s ≥ 2⁻⁸⁴ by at most n 2⁻⁴² times s: 2⁻²⁵ times s for n = 2¹⁷ classes.
    least, below = (2.0**-700, 2.0**600) if at.dtype == jnp.float64 else (2.0**-84, 2.0**64)

    def step(state):
        redo, _, *found = state
        return [redo, jnp.zeros_like(state[1]), *second_pass(redo, *found)]

    zero = (at > LOWEST) & (at < HIGHEST)
    m = jnp.where(zero, jnp.zeros_like(at), at)
    s, *more = others(m)
    # If m = 0 and s < least, x_y is the maximum. If then x_y ≥ 0, the maximum as m would only make eᵢ smaller, so no
    # second pass is needed. This holds also for a row that `where` masks: its only class is its label, with logit 0.
    redo = ~(s < jnp.where(zero, jnp.full_like(s, below), jnp.full_like(s, most))) | (zero & (at < 0) & (s < least))
    state = [redo, _first_of(redo), m, s, *more]
    return lax.while_loop(lambda state: state[1] > 0, step, state)[2:]


def at_maximum(others: Callable, maximum: Callable[[], Array]) -> Callable:
    """The argument `second_pass` of `off_known_label`, if that pass may simply call others(m) for all rows."""

    def second_pass(redo, m, *_):
        m = jnp.where(redo, maximum(), m)
        return [m, *others(m)]

    return second_pass


@custom_vmap
def _first_of(redo):
    """The position of the first True, counted from 1, or 0 if there is none. It is used instead of `any`, which XLA
    turns into a tree of vectors on a CPU: that takes longer to compile than the rest of a label's loss."""
    none = vary_over(varying(redo), jnp.full(1, 0.5, jnp.float32))
    return lax.argmax(jnp.concatenate([*none, redo.astype(none[0].dtype).ravel()]), 0, jnp.int32)


# Under `jax.vmap`, the whole batch has one flag. If each member of the batch had its own flag, the loop would always
# run, and store N × n numbers.
@_first_of.def_vmap
def _first_of_batch(size, batched, redo):
    return _first_of(redo), False
