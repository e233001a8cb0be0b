"""Closed-form derivative rules that last, and the quotient that their coefficients are written in.

A rule's coefficients are differentiated again for a Hessian, and again for a third derivative, where a plain `a / b`
would meet 0 · ∞ at a corner. `ratio` carries a rule written in itself, so no order does; and since a rule divides its
tangents, instead of multiplying them by 1/b, directions of b's size stay within the float range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jce._elementary import unless_negative
from jce._mul0 import mul0, over
from jce._primitives import as_one, live_jvp


class custom_jvp:
    """`jax.custom_jvp`, whose rule lasts inside of `lax.scan` and `lax.map` too.

    JAX before 0.12, when it differentiates a loop in reverse mode, writes out the kernels and coefficients that a rule
    calls. Differentiated again they are plain code, in which 0 · ∞ is NaN. What is checkpointed it leaves as it is; and
    this checkpoint keeps every residual, so that nothing is computed twice.
    """

    def __init__(self, kernel: Callable, nondiff_argnums: tuple[int, ...] = ()):
        functools.update_wrapper(self, kernel)
        self._kernel = with_rule = jax.custom_jvp(as_one(kernel, nondiff_argnums), nondiff_argnums=nondiff_argnums)
        self.defjvp = with_rule.defjvp
        if jax.__version_info__ < (0, 12):
            self._kernel = jax.checkpoint(
                with_rule,
                prevent_cse=False,
                policy=jax.checkpoint_policies.everything_saveable,
                static_argnums=nondiff_argnums,
            )

    def __call__(self, *arguments):
        return self._kernel(*arguments)


def along(tangents, *terms: Callable[[Array], Array]) -> Array:
    """The sum of terms, each linear in its tangent, of what is differentiated: other arguments add nothing."""
    live = [term(t) for term, t in zip(terms, tangents, strict=True) if not isinstance(t, SymbolicZero)]
    return functools.reduce(jnp.add, live)


def directional_derivative(primals, tangents, *partials: Callable[..., Array], static=()) -> Array:
    """Σᵢ ∂ᵢf · tᵢ, elementwise."""
    return along(tangents, *(lambda t, f=f: mul0(f(*primals, *static), t) for f in partials))


def def_partials(kernel: custom_jvp, *partials: Callable[..., Array]) -> None:
    """Gives an elementwise kernel its rule: one partial derivative an argument, as functions of all arguments."""

    def rule(primals, tangents):
        return kernel(*primals), directional_derivative(primals, tangents, *partials)

    kernel.defjvp(rule, symbolic_zeros=True)


def def_partials_of_sum(kernel: custom_jvp, *partials: Callable[..., Array]) -> None:
    """The same for a sum over classes, its last argument and that of the partials, which are elementwise."""

    def rule(classes, primals, tangents):
        tangent = directional_derivative(primals, tangents, *partials, static=(classes,))
        return kernel(*primals, classes), classes.sum(tangent)

    kernel.defjvp(rule, symbolic_zeros=True)


def def_tangents(kernel: custom_jvp, *tangents_of: Callable[..., Array]) -> None:
    """The same, each partial as a linear function of its argument's tangent and all arguments."""

    def rule(primals, tangents):
        return kernel(*primals), along(tangents, *(lambda t, f=f: f(t, *primals) for f in tangents_of))

    kernel.defjvp(rule, symbolic_zeros=True)


def def_twin(kernel: custom_jvp, twin: Callable[..., Array]) -> None:
    """Gives an elementwise kernel the derivative of another expression for it, accurate in the derivative."""
    kernel.defjvp(lambda primals, tangents: (kernel(*primals), jax.jvp(twin, primals, tangents)[1]))


def def_at_once(at_once: custom_jvp, *functions: Callable) -> None:
    """Gives a kernel that computes several functions of rows the derivatives of each, which have rules of their own."""

    def rule(classes, primals, tangents):
        def apart(*arguments):
            return tuple(f(*arguments, classes) for f in functions)

        return at_once(*primals, classes), live_jvp(apart, primals, tangents)[1]

    at_once.defjvp(rule, symbolic_zeros=True)


def both_zero(a: Array, b: Array) -> Array:
    """Where an outcome is absent from both distributions."""
    return (a == 0) & (b == 0)


@custom_jvp
def ratio(a: Array, b: Array) -> Array:
    """a / b for b ≥ 0, with 0 / 0 = 0; NaN for b < 0."""
    return unless_negative(b, jnp.where(a == 0, jnp.zeros_like(a), a / jnp.abs(b)))  # |b|: -0 is 0 too


def over_if_present(t: Array, a: Array, b: Array) -> Array:
    """t / b, but 0 where a = b = 0: the tangent t of log b weighed by a."""
    return over(jnp.where(both_zero(a, b), jnp.zeros_like(t), t), b)


# d(a/b) = (da - (a/b) db) / b: its two factors stay in range where a/b² is beyond it.
@ratio.defjvp
def _ratio_rule(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return ratio(a, b), over_if_present(da - mul0(ratio(a, b), db), a, b)


@custom_jvp
def negative(x: Array) -> Array:
    """0 - x, which is 0 and not -0 at x = 0: the entropy of certainty has a reciprocal of +∞."""
    return 0 - x


# Under differentiation plain -x, which at 0 is -0: XLA moves it out of a mean, and then reads the batch once less.
negative.defjvp(lambda primals, tangents: (-primals[0], -tangents[0]))
