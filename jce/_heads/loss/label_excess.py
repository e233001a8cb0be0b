"""The loss of a label, and the excess, its derivative with respect to the logits, with few passes over the logits.

`_quantities/label_loss.py` has the formulas, and `_softmax/__init__.py` the terms. The label's logit, and from it the
shift m (`known_label.py`), can be computed before the matmul that computes the other logits. Then an accelerator fuses
exp, the sum and the rounding of e with that matmul, and stores only e.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jce._heads.loss.logits import Logits, capped, slope
from jce._heads.loss.products import Products
from jce._heads.loss.temperature import at_temperature, whole_log_sum
from jce._jax.arguments import is_array
from jce._jax.classes import Classes
from jce._jax.layout import may_be_split
from jce._jax.platforms import named
from jce._jax.varying import barrier
from jce._numerics.elementary import exp
from jce._numerics.mul0 import over
from jce._quantities.label_loss import OfRow, of_row, or_none
from jce._softmax.backend import Backend, unless_no_class
from jce._softmax.kernel import backend_for
from jce._softmax.known_label import at_maximum, off_known_label
from jce._softmax.sums import OffLabel


class Target(NamedTuple):
    """The labels [C] of C tokens, their temperatures [C] (None if all are 1), and the traced numbers."""

    labels: Array
    temperatures: Array | None
    traced: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LabelLoss:
    """The static part of the loss (1-ε) log 1/q_y + ε/n Σᵢ log 1/qᵢ + ζ (log Σ exp xᵢ)². If ε or ζ is traced, it is
    None here, and `Target` has it instead."""

    classes: Classes
    smoothing: float | None  # ε
    z_loss: float | None  # ζ
    may_be_greedy: bool  # whether a temperature may be 0: e then has entries of ±∞, whose product with 0 must be 0

    def numbers(self, target: Target, dtype) -> Any:
        """ε and ζ. A traced number is an array of this dtype, and a Python 0 is None."""
        known = {"smoothing": self.smoothing, "z_loss": self.z_loss} | target.traced
        return tuple(a.astype(dtype) if is_array(a) else or_none(a) for a in known.values())

    def may_read_once(self, tempered: bool, capped: bool) -> bool:
        """Whether one pass over the logits is enough. A temperature needs another pass, for the maximum: x - max x is
        divided by the temperature. Smoothing together with a soft cap needs another pass too: the slope of the cap
        multiplies e - εZ/n, and Z isn't known before the first pass ends."""
        return not tempered and (self.smoothing == 0 or not capped)


class Excess(NamedTuple):
    """The loss ℓ [C], and e [C, n] and r [C] with ∂ℓ/∂u = r e, where u are the logits before the soft cap."""

    losses: Array
    e: Array
    r: Array


def excess_of_product(
    loss: LabelLoss, products: Products, platform: str | None, target: Target, hidden, head, soft_cap
) -> Excess:
    """The excess at the logits hidden · headᵀ + bias, before their matmul is done."""
    x = Logits(hidden, head, soft_cap, products)
    reading = one_reading(loss, platform, target, x)
    if reading is None:
        return excess_of_logits(loss, platform, target, x.uncapped(), x.soft_cap)
    return reading.excess(named(platform).fuses_operands)


def excess_of_logits(loss: LabelLoss, platform: str | None, target: Target, u: Array, soft_cap: Array | None) -> Excess:
    """The excess at given logits u, in several passes over u."""
    backend = backend_for(loss.classes, named(platform), u)
    u = backend.stored(u)  # otherwise XLA would compute u again to look up the label
    column, y, t = backend.column, target.labels, target.temperatures
    of_head = backend.fold(capped(u, soft_cap))
    x = at_temperature(of_head, t, backend)
    numbers, n = loss.numbers(target, x.dtype), backend.count(x)
    off = backend.off_label(y, x)
    mean = None if numbers[0] is None else backend.sum((x - column(off.m)) / n)
    row = of_row(off, n, mean, *numbers, whole=lambda log_sum: whole_log_sum(log_sum, of_head, t, backend))
    row, r = _scaled(row, off, backend.masks)
    e = row.entries(_unless_nan(exp(x - column(off.m))), column)
    e = backend.put(backend.unfold(e), backend.local(y, x), row.at_label)
    if t is not None:
        r /= jnp.where(t == 0, jnp.ones_like(t), t)
        # At a temperature of 0, entries of the derivative are ±∞ or 0.
        e = jnp.where((t == 0)[:, None], over(e, jnp.zeros_like(e)), e)
    if soft_cap is not None:
        e *= slope(u, soft_cap)
    return Excess(row.losses, e, r)


def one_reading(loss: LabelLoss, platform: str | None, target: Target, x: Logits) -> OneReading | None:
    """One pass over the logits, or None if one pass is not enough or not faster."""
    backend = backend_for(loss.classes, named(platform), x.head.bias)
    may = loss.may_read_once(target.temperatures is not None, x.soft_cap is not None)
    return OneReading(loss, backend, target, x) if may and backend.masks and not may_be_split(x.head.bias) else None


class OneReading:
    """A single pass over the logits. The label's logit is computed before the pass, and gives the shift m."""

    def __init__(self, loss: LabelLoss, backend: Backend, target: Target, x: Logits):
        self.x, self.backend, self.labels = x, backend, target.labels
        self.y = backend.local(target.labels, x.head.bias)
        self.u_y = backend.of_who_has(x.uncapped_at(self.y), x.head.bias, self.y)
        self.x_y = capped(self.u_y, x.soft_cap)
        self.numbers, self.n = loss.numbers(target, self.x_y.dtype), backend.count(x.head.bias)

    def losses(self) -> Array:
        return self._of_row(*self._read())[0].losses

    def excess(self, divides_later: bool) -> Excess:
        """The excess. If `divides_later`, e is stored before it is scaled, and scaled where the next matmul reads it.
        Otherwise e is scaled before it is stored, as soon as s is known."""
        backend, cap = self.backend, self.x.soft_cap
        m, s, mean, e = self._read((lambda e, *_: e) if divides_later else self._entries)
        row, r = self._of_row(m, s, mean)
        at_label = row.at_label if cap is None else row.at_label * slope(self.u_y, cap)
        if divides_later:
            e = backend.put(row.entries(e.astype(s.dtype), backend.column), self.y, at_label)
        else:
            e = backend.scattered(e, self.y, at_label.astype(e.dtype)).astype(s.dtype)
        return Excess(row.losses, e, r)

    def _of_row(self, m, s, mean) -> tuple[OfRow, Array]:
        d = unless_no_class(m - self.x_y, self.labels, self.x.head.bias, self.backend)
        off = OffLabel(m, s, d)
        return _scaled(of_row(off, self.n, mean, *self.numbers), off, divides=True)

    def _entries(self, e, m, s, mean):
        return self._of_row(m, s, mean)[0].entries(e, self.backend.column)

    def _read(self, stored: Callable | None = None) -> list[Array]:
        """m, s, the mean of x - m, and stored(e, m, s, mean) if `stored` is given."""
        read = functools.partial(self._reading, stored)
        second_pass = at_maximum(functools.partial(read, second=True), lambda: _maximum(self.x, self.backend))
        # If m = x_y, the bound s < 1e9 admits labels whose logit is up to log 1e9 = 20.7 below the maximum. There the
        # rounding of x - m loses no more digits than the rounding of hidden states and head.
        return off_known_label(self.x_y, read, second_pass, most=1e9)

    def _reading(self, stored, m, second=False):
        # Each of the two passes computes the label's mask: if they shared a mask, XLA would store it.
        x, backend = self.x, self.backend
        u = x.uncapped()
        logits = capped(u, x.soft_cap) - m[:, None]
        e = exp(logits)
        e = jnp.where(backend.is_at(e, self.y), jnp.zeros_like(e), e)
        s, mean = backend.sum(e), jnp.zeros_like(m) if self.numbers[0] is None else backend.sum(logits / self.n)
        if stored is None:
            return [s, mean]
        e = stored(e if x.soft_cap is None else e * slope(u, x.soft_cap), m, s, mean)
        e = _unless_nan(e) if second else e  # every row with a NaN gets a second pass
        return barrier([s, mean, e.astype(jnp.bfloat16) if x.products.narrow else e])


def _scaled(row: OfRow, off: OffLabel, divides: bool) -> tuple[OfRow, Array]:
    """The row with scaled entries, and r, where r times the entries is the excess.

    Without `divides`, nothing is scaled and r = 1/Z. With `divides`, all entries are divided by s or by the magnitude
    of the label's entry, whichever is larger. If it is the label's entry, that entry becomes ±1, which is exact in
    bfloat16.
    """
    losses, z, factor, taken, at_label = row
    r = 1 / z
    if divides:
        largest = jnp.maximum(jnp.maximum(off.s, jnp.abs(at_label)), jnp.finfo(z.dtype).tiny)
        r, factor = largest / z, (1 if factor is None else factor) / largest
        taken, at_label = None if taken is None else taken / largest, at_label / largest
    # In a row with a NaN, only r is NaN: a NaN in e would spread through matmuls even if the token's cotangent is 0.
    number = z <= jnp.finfo(z.dtype).max
    factor, taken, at_label = jax.tree.map(lambda a: jnp.where(number, a, jnp.zeros_like(a)), (factor, taken, at_label))
    return OfRow(losses, z, factor, taken, at_label), r


def _unless_nan(e: Array) -> Array:
    return jnp.where(e == e, e, jnp.zeros_like(e))


def _maximum(x: Logits, backend: Backend) -> Array:
    """Each token's max x, computed for half a chunk at a time: a program reserves memory for these logits even if it
    never runs this code."""
    if not isinstance(count := x.hidden.shape[0], int):  # symbolic
        return backend.max(x.whole())
    half = count // 2
    halves = (x._replace(hidden=h) for h in (x.hidden[:half], x.hidden[half:]))
    return jnp.concatenate([backend.max(part.whole()) for part in halves])
