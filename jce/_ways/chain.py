"""A GPU's way with short rows: all sums of a row, and what is made of them, are one kernel.

XLA makes one kernel of a chain of sums over rows that fit a core, and of the array made of them, if x is nowhere taken
but in x - m, nothing has two results, and no barrier is inside.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._classes import Classes
from jce._elementary import exp
from jce._ways.reduction import FAR, Reduction
from jce._ways.way import Normalizer, OffLabel, Sums, Way, off_maximum, unless_no_class

LONGEST_CHAIN = 16_384  # classes, of which XLA makes one kernel


@dataclasses.dataclass(frozen=True)
class Chain(Way):
    @staticmethod
    def may_be(classes: Classes, x: Array) -> bool:
        return x.shape[classes.axis] <= LONGEST_CHAIN and classes.mesh_axis is None and not classes.are_split(x)

    def results(self, function, arrays, ndim, apart):
        """Each in a chain of its own, which also ends with a row: XLA may make no one of two, or of the sum of a row
        and that of a batch."""
        alone = jax.tree.map(lax.optimization_barrier, arrays)  # each its own, for t is unlike x
        results, tree = jax.tree.flatten(function(*(alone if apart else arrays)))
        results[1:] = [jax.tree.leaves(function(*alone))[i] for i in range(1, len(results))]
        return tree.unflatten([r if r.ndim == ndim else lax.optimization_barrier(r) for r in results])

    def maximum(self, x):
        return self.max(x)  # in a chain x - m is NaN where it is +∞

    def sums(self, x):
        m = self.maximum(x)
        d = x - self.column(m)
        e = exp(d)
        s = self.sum(jnp.where(e > 0.75, jnp.zeros_like(e), e))
        n = Normalizer(m, jnp.maximum(s, off_maximum(self.sum(e))))
        return Sums(*n, -self.sum(e * jnp.maximum(self.depth(x, n), -FAR)))

    def for_log_sum(self, x):
        return Reduction.of(self, x)

    def comparison(self, x, stored):
        # As a chain it would have to take y - n and x - m apart, each with its rounding.
        return Reduction.of(self, x).comparison(x, stored)

    def depth(self, x, n):
        return n.depth_and_dominant(x, n.m, self)[0]

    def off_label(self, labels, x):
        m = self.maximum(x)
        is_label, d = self.is_at(x, self.local(labels, x)), x - self.column(m)
        s = self.sum(jnp.where(is_label, jnp.zeros_like(d), exp(d)))
        d = -self.sum(jnp.where(is_label, d, jnp.zeros_like(d)))
        return OffLabel(m, s, unless_no_class(d, labels, x, self))
