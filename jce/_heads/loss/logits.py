"""`Logits`: the logits of a chunk of tokens before their matmul, soft_cap(hidden · headᵀ + bias). And the soft cap."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jce._heads.loss.products import Head, Products
from jce._jax.varying import like
from jce._numerics.calculus import custom_jvp, def_partials
from jce._numerics.elementary import exp, tanh
from jce._numerics.mul0 import mul0


class Logits(NamedTuple):
    """The logits of C tokens with hidden states [C, d], before the matmul."""

    hidden: Array
    head: Head
    soft_cap: Array | None
    products: Products

    def whole(self) -> Array:
        """The logits, [C, n]."""
        return capped(self.uncapped(), self.soft_cap)

    def uncapped(self) -> Array:
        return self.products.with_head(self.hidden, self.head, 1) + self.head.bias[None]

    def uncapped_at(self, y: Array) -> Array:
        """For each token, the logit of its class y, before the cap: [C]."""
        weight, bias = (x.at[y].get(mode="clip") for x in (self.head.weight, self.head.bias))
        return (self.hidden.astype(bias.dtype) * weight.astype(bias.dtype)).sum(-1) + bias


def capped(u: Array, soft_cap: Array | None) -> Array:
    if soft_cap is None:
        return u
    allowed, u = _allowed(u)
    return jnp.where(allowed, _soft_cap(u, like(soft_cap, u)), jnp.full_like(u, -jnp.inf))


def slope(u: Array, soft_cap: Array) -> Array:
    """dx/du for the capped logits x."""
    allowed, u = _allowed(u)
    return jnp.where(allowed, _slope(u / like(soft_cap, u)), jnp.zeros_like(u))


def _allowed(u):
    """Which logits aren't -∞, and the logits with 0 in place of -∞. The cap of -∞ is -∞, with derivative 0."""
    allowed = u != -jnp.inf
    return allowed, jnp.where(allowed, u, jnp.zeros_like(u))


@custom_jvp
def _soft_cap(u, c):
    """c tanh v at v = u/c. If v² < eps, it returns u, since XLA would flush a subnormal v to 0. The result is then
    within eps/3 of c tanh v, since tanh v = v (1 - v²/3 + …)."""
    v = u / c
    return jnp.where(v * v < jnp.finfo(v.dtype).eps, u, c * tanh(v))


@custom_jvp
def _slope(v):
    """1 - tanh² v, computed as sech² v: the difference would cancel where tanh² v is near 1."""
    e = exp(-jnp.abs(v))
    sech = 2 * e / (1 + e * e)
    return sech * sech


@custom_jvp
def _slope_in_cap(v):
    """tanh v - v (1 - tanh² v)"""
    return tanh(v) - mul0(v, _slope(v))


# With v = u/c: ∂/∂u c tanh v = 1 - tanh² v, ∂/∂c c tanh v = tanh v - v (1 - tanh² v)
def_partials(_soft_cap, lambda u, c: _slope(u / c), lambda u, c: _slope_in_cap(u / c))
# d (1 - tanh² v)/dv = -2 tanh v (1 - tanh² v), d (tanh v - v (1 - tanh² v))/dv = 2v tanh v (1 - tanh² v)
def_partials(_slope, lambda v: -2 * tanh(v) * _slope(v))
def_partials(_slope_in_cap, lambda v: 2 * tanh(v) * mul0(v, _slope(v)))
