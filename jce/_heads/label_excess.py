"""A label's loss and its derivative in the logits, by the fewest passes over them.

With eᵢ = exp(xᵢ - m), s = Σ eᵢ over all classes but the label's and q_y - 1 = -s/Z, Z ∂ℓ/∂xᵢ is

    eᵢ (1 + 2ζ log Σ exp x) - ε Z/n,   at the label   -s + ε (Z - Z/n) + 2ζ e_y log Σ exp x

The label's logit can be known before the product that makes the others, and with it m (`_ways/known_label.py`). Then an
accelerator makes exp, the sum and the rounding of e part of that product, and stores e alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jce._arguments import is_array
from jce._classes import Classes
from jce._elementary import exp, log1p
from jce._heads.logits import Logits, capped, slope
from jce._heads.products import Products
from jce._heads.temperature import at_temperature, whole_log_sum
from jce._layout import may_be_split
from jce._mul0 import over
from jce._platforms import named
from jce._soft_targets import scaled_square, smoothed
from jce._softmax import surprisal_at_label
from jce._ways.kernel import way_of
from jce._ways.known_label import at_maximum, off_known_label
from jce._ways.way import OffLabel, Way, unless_no_class
from jce._z_loss import log_sum_off_label


class Target(NamedTuple):
    """Of tokens: labels [C] and temperatures [C], or None where all are 1; and the numbers that are traced."""

    labels: Array
    temperatures: Array | None
    traced: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Terms:
    """Of a loss, with the numbers that aren't traced: static."""

    classes: Classes
    smoothing: float | None
    z_loss: float | None

    def numbers(self, target: Target, dtype) -> Any:
        """ε and ζ"""
        known = {"smoothing": self.smoothing, "z_loss": self.z_loss} | target.traced
        return tuple(a.astype(dtype) if is_array(a) else a for a in known.values())

    def may_read_once(self, tempered: bool, capped: bool) -> bool:
        """Whether the label's logit can be known before the others: not where they are divided, nor where others have
        it; and whether e can be stored before Z is known: not where a cap's slope meets the smoothing's part."""
        return not tempered and (self.smoothing == 0 or not capped) and self.classes.mesh_axis is None


def some(number) -> bool:
    """Whether a number is there: Python's 0 isn't."""
    return is_array(number) or number != 0


class Excess(NamedTuple):
    """ℓ [C], and e [C, n] and r [C] with ∂ℓ/∂u = r e, of the logits u before the cap."""

    losses: Array
    e: Array
    r: Array


def excess_of_product(
    terms: Terms, products: Products, platform: str | None, target: Target, hidden, head, soft_cap
) -> Excess:
    """Of logits that aren't multiplied out yet."""
    x = Logits(hidden, head, soft_cap, products)
    device, tempered = named(platform), target.temperatures is not None
    classes = way_of(terms.classes, device, x.head.bias)
    if classes.masks and terms.may_read_once(tempered, soft_cap is not None) and not may_be_split(x.head.bias):
        return _in_one_reading(terms, classes, device.fuses_operands, target, x)
    return excess_of_logits(terms, platform, target, x.uncapped(), x.soft_cap)


def excess_of_logits(terms: Terms, platform: str | None, target: Target, u: Array, soft_cap: Array | None) -> Excess:
    """r = 1/ZT. Where e may be rounded, it is divided by s, so that its label's entry is exactly -1."""
    classes = way_of(terms.classes, named(platform), u)
    u = classes.stored(u)  # once, though the label is looked up in it
    column, y, t = classes.column, target.labels, target.temperatures
    of_head = classes.fold(capped(u, soft_cap))
    x = at_temperature(of_head, t, classes)
    smoothing, z_loss = terms.numbers(target, x.dtype)
    n = classes.count(x)
    off = classes.off_label(y, x)
    m, s, d = off
    e, e_y = exp(x - column(m)), exp(-d)
    z, log_z = s + e_y, log1p(s - (1 - e_y))
    losses, at_label = surprisal_at_label(off), -s
    if some(smoothing):
        losses = smoothed(losses, log_z + classes.sum(column(m) - x) / n, smoothing)
        at_label += smoothing * (z - z / n)
    if some(z_loss):
        log_sum = whole_log_sum(m + log_z, of_head, t, classes)
        losses += scaled_square(z_loss, log_sum)
        at_label += 2 * z_loss * log_sum * e_y
        e *= column(1 + 2 * z_loss * log_sum)
    if some(smoothing):
        e -= column(smoothing * (z / n))
    if classes.masks:
        others = jnp.maximum(s, jnp.finfo(s.dtype).tiny)
        e, at_label, z = e * column(1 / others), at_label / others, z / others
    # NaN is r's alone: where a token's cotangent is 0 the product of e with it has to be.
    number = z <= jnp.finfo(z.dtype).max
    e = jnp.where(column(number), e, jnp.zeros_like(e))
    at_label = jnp.where(number, at_label, jnp.zeros_like(at_label))
    e = classes.put(classes.unfold(e), classes.local(y, x), at_label)
    if t is not None:
        z *= jnp.where(t == 0, jnp.ones_like(t), t)
        # At a temperature of 0 the derivative is ±∞ where it isn't 0.
        e = jnp.where((t == 0)[:, None], over(e, jnp.zeros_like(e)), e)
    if soft_cap is not None:
        e *= slope(u, soft_cap)
    return Excess(losses, e, 1 / z)


class _OfRow(NamedTuple):
    """ℓ, r, a factor of each e but the label's, what is then taken from it, and the label's entry."""

    losses: Array
    r: Array
    factor: Array
    taken: Array
    at_label: Array

    def entries(self, e: Array) -> Array:
        return e * self.factor[:, None] - self.taken[:, None]


def _in_one_reading(terms: Terms, classes: Way, divides_later: bool, target: Target, x: Logits) -> Excess:
    """r = (1 + 2ζ log Σ exp x) s/Z. e is divided by both as soon as s is known, or later, as it is multiplied."""
    y = target.labels
    u_y = x.uncapped_at(y)
    x_y = capped(u_y, x.soft_cap)
    smoothing, z_loss = terms.numbers(target, x_y.dtype)
    n = classes.count(x.head.bias)

    def of_row(m, s, mean):
        d = unless_no_class(m - x_y, y, x.head.bias, classes)
        off = OffLabel(m, s, d)
        z, losses, at_label, pull = off.z, surprisal_at_label(off), -s, jnp.ones_like(s)
        log_sum = log_sum_off_label(off, losses)
        if some(smoothing):
            losses = smoothed(losses, (log_sum - m) - mean, smoothing)
            at_label += smoothing * (z - z / n)
        if some(z_loss):
            losses += scaled_square(z_loss, log_sum)
            at_label += 2 * z_loss * log_sum * exp(-d)
            pull = 1 + 2 * z_loss * log_sum
            # One that is nearly 0 is one of the small: beside the label's entry nothing is left of the others.
            small = 2.0**-12 if x.products.narrow else 2.0**-30
            pull = jnp.where(jnp.abs(pull) < small, jnp.full_like(pull, small), pull)
        others = jnp.maximum(s, jnp.finfo(s.dtype).tiny)
        number = z <= jnp.finfo(s.dtype).max  # NaN is r's alone
        entries = (1 / others, smoothing * (z / n) / pull / others, at_label / pull / others)
        return _OfRow(losses, pull * (others / z), *(jnp.where(number, a, jnp.zeros_like(s)) for a in entries))

    def reading(m, again=False):
        # The mask is made here: one that the two readings share would be stored.
        u = x.uncapped()
        logits = capped(u, x.soft_cap) - m[:, None]
        e = exp(logits)
        e = jnp.where(classes.is_at(e, y), jnp.zeros_like(e), e)
        s, mean = e.sum(-1), logits.sum(-1) / n if some(smoothing) else jnp.zeros_like(m)
        e = e if x.soft_cap is None else e * slope(u, x.soft_cap)
        e = e if divides_later else of_row(m, s, mean).entries(e)
        if again:  # as all rows are that have a NaN
            e = jnp.where(e == e, e, jnp.zeros_like(e))
        return list(lax.optimization_barrier((s, mean, e.astype(jnp.bfloat16) if x.products.narrow else e)))

    # Hidden states and head are rounded as much as such sums are.
    again = at_maximum(functools.partial(reading, again=True), lambda: _maximum(x))
    m, s, mean, e = off_known_label(x_y, reading, again, most=1e9)
    row = of_row(m, s, mean)
    at_label = row.at_label if x.soft_cap is None else row.at_label * slope(u_y, x.soft_cap)
    if divides_later:
        e = classes.put(row.entries(e.astype(s.dtype)), y, at_label)
    else:
        e = classes.scattered(e, y, at_label.astype(e.dtype)).astype(s.dtype)
    return Excess(row.losses, e, row.r)


def _maximum(x: Logits) -> Array:
    """Of each token, by halves: a program holds the memory for it, also where it never comes to that."""
    if not isinstance(count := x.hidden.shape[0], int):  # symbolic
        return x.whole().max(-1)
    half = count // 2
    halves = (x._replace(hidden=h) for h in (x.hidden[:half], x.hidden[half:]))
    return jnp.concatenate([part.whole().max(-1) for part in halves])
