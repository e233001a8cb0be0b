"""Closed-form derivative rules that hold to any order, and the quotient that their coefficients use.

The coefficients of a rule are differentiated again for a Hessian, and again for a third derivative. There a plain
`a / b` would give 0 · ∞ = NaN at the boundary. The rule of `ratio` uses `ratio` itself, so it gives no such NaN at any
order. Rules divide tangents by b instead of multiplying them by 1/b: if tangents are as small as b, intermediate
results might otherwise leave the range of floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jce._jax.restricted import live_jvp
from jce._jax.waiting import as_one
from jce._numerics.elementary import unless_negative
from jce._numerics.mul0 import mul0, over


class custom_jvp:
    """`jax.custom_jvp`, with a rule that holds to any order also inside `lax.scan` and `lax.map`."""

    def __init__(self, kernel: Callable, nondiff_argnums: tuple[int, ...] = ()):
        functools.update_wrapper(self, kernel)
        self._kernel = with_rule = jax.custom_jvp(as_one(kernel, len(nondiff_argnums)), nondiff_argnums=nondiff_argnums)
        self.defjvp = with_rule.defjvp
        # Until JAX 0.12: reverse mode of a loop inlines the kernels that a rule calls. They then lose their own rules,
        # and as plain code give 0 · ∞ = NaN when differentiated again. A checkpoint isn't inlined. This checkpoint
        # keeps all residuals, so nothing is recomputed.
        if jax.__version_info__ < (0, 12):
            self._kernel = jax.checkpoint(
                with_rule,
                prevent_cse=False,
                policy=jax.checkpoint_policies.everything_saveable,
                static_argnums=nondiff_argnums,
            )

    def __call__(self, *arguments):
        return self._kernel(*arguments)


def sum_of_tangents(tangents, *terms: Callable[[Array], Array]) -> Array:
    """The sum of term(tangent) over the arguments that are differentiated. The tangents of others are None or symbolic
    zeros."""
    live = [term(t) for term, t in zip(terms, tangents, strict=True) if not isinstance(t, SymbolicZero | None)]
    return functools.reduce(jnp.add, live)


def directional_derivative(primals, tangents, *partials: Callable[..., Array], static=()) -> Array:
    """Σᵢ ∂ᵢf · tᵢ, elementwise."""
    return sum_of_tangents(tangents, *(lambda t, f=f: mul0(f(*primals, *static), t) for f in partials))


def def_partials(kernel: custom_jvp, *partials: Callable[..., Array]) -> None:
    """Gives an elementwise kernel its rule: a partial derivative for each argument, as a function of all arguments."""

    def rule(primals, tangents):
        return kernel(*primals), directional_derivative(primals, tangents, *partials)

    kernel.defjvp(rule, symbolic_zeros=True)


def def_partials_of_sum(kernel: custom_jvp, *partials: Callable[..., Array]) -> None:
    """`def_partials` for a sum over classes. Partials are elementwise; they and the kernel take the classes last."""

    def rule(classes, primals, tangents):
        tangent = directional_derivative(primals, tangents, *partials, static=(classes,))
        return kernel(*primals, classes), classes.sum(tangent)

    kernel.defjvp(rule, symbolic_zeros=True)


def def_tangents(kernel: custom_jvp, *tangents_of: Callable[..., Array]) -> None:
    """`def_partials`, with a term for each argument instead of a partial derivative: a function of the argument's
    tangent and of all arguments, linear in the tangent."""

    def rule(primals, tangents):
        return kernel(*primals), sum_of_tangents(tangents, *(lambda t, f=f: f(t, *primals) for f in tangents_of))

    kernel.defjvp(rule, symbolic_zeros=True)


def def_twin(kernel: custom_jvp, twin: Callable[..., Array]) -> None:
    """Gives an elementwise kernel the derivative of `twin`, an equal expression whose derivative is accurate."""
    kernel.defjvp(lambda primals, tangents: (kernel(*primals), jax.jvp(twin, primals, tangents)[1]))


def def_at_once(at_once: custom_jvp, *functions: Callable) -> None:
    """For a kernel that computes several functions at once: its derivatives are those of these functions."""

    def rule(classes, primals, tangents):
        def separately(*arguments):
            return tuple(f(*arguments, classes) for f in functions)

        return at_once(*primals, classes), live_jvp(separately, primals, tangents)[1]

    at_once.defjvp(rule, symbolic_zeros=True)


def both_zero(a: Array, b: Array) -> Array:
    """A mask that is True where a class has probability 0 in both distributions."""
    return (a == 0) & (b == 0)


@custom_jvp
def ratio(a: Array, b: Array) -> Array:
    """a / b for b ≥ 0, with 0 / 0 = 0; NaN for b < 0."""
    return unless_negative(b, jnp.where(a == 0, jnp.zeros_like(a), a / jnp.abs(b)))  # |b|: a / -0 would be -∞


def over_if_present(t: Array, a: Array, b: Array) -> Array:
    """t / b, the derivative of log b along t, but 0 where a = b = 0, that is, for a class that is absent."""
    return over(jnp.where(both_zero(a, b), jnp.zeros_like(t), t), b)


# d(a/b) = (da - (a/b) db) / b, which stays in range where a/b² would overflow.
@ratio.defjvp
def _ratio_rule(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return ratio(a, b), over_if_present(da - mul0(ratio(a, b), db), a, b)


@custom_jvp
def negative(x: Array) -> Array:
    """0 - x. At x = 0 it is 0, while -x is -0, and the reciprocal of an entropy of -0 would be -∞."""
    return 0 - x


# Under differentiation it is plain -x, and thus -0 at 0. XLA can move -x out of a mean, which saves one pass over the
# batch. It can't move 0 - x.
negative.defjvp(lambda primals, tangents: (-primals[0], -tangents[0]))
