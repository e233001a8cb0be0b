"""0 · anything = 0: the product and the quotient that closed-form derivatives need at a corner.

At a corner a partial derivative is infinite (∂H/∂p = +∞ at p = 0) while the tangent or cotangent that multiplies it is
often exactly zero: another row's, a masked class's, a weight of 0. The limit along such a direction is 0, but the
IEEE product is NaN. Reverse mode couldn't transpose a rule with `jnp.where(t == 0, ...)`, which isn't linear in t. So
the product is a primitive that is declared bilinear. It lowers to a multiply and a select.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.lax import mul_p

from jce._jax.layout import split_alike
from jce._jax.primitives import batch_axis_first, primitive
from jce._jax.varying import varying_alike


def mul0(c: Array, t: Array) -> Array:
    """c · t elementwise, and 0 where t = 0, whatever c is there. Equal shapes and dtypes; linear in each argument."""
    return _bind(c, t, "t")


def mul00(c: Array, t: Array) -> Array:
    """c · t elementwise, and 0 where c = 0 or t = 0, whatever the other is.

    In a first derivative only t is ever exactly 0 where c is infinite, so mul0 makes only that comparison. In a second
    one c has a tangent too, which may be 0 where t is infinite.
    """
    return _bind(c, t, "either")


def multiply(c: Array, t: Array) -> Array:
    """Plain c · t, with mul00 as its derivatives and transposes: for sums, in which a select would cost a pass.

    It is NaN where one factor is 0 and the other infinite: the caller must avoid or replace that.
    """
    return _bind(c, t, "neither")


def over(t: Array, b: Array) -> Array:
    """t / |b| elementwise, and 0 where t = 0, whatever b is there; linear in t.

    Not mul0(1/b, t): its derivative in b would first multiply two tangents, as small as b · b, and underflow, before it
    divides by b². Here each is divided by b first.
    """
    return _over_p.bind(*varying_alike(*split_alike(t, b)))


def _bind(c, t, zero):
    c, t = varying_alike(*split_alike(c, t))
    return _mul0_p.bind(c, t, zero=zero)


def _multiply_and_select(c, t, *, zero):
    if zero == "neither":
        return c * t
    if zero == "neither, batched":
        return jnp.maximum(c * t, jnp.finfo(t.dtype).min - jnp.abs(c * t))
    is_zero = t == 0 if zero == "t" else (c == 0) | (t == 0)
    return jnp.where(is_zero, jnp.zeros_like(t), c * t)


def _divide_and_select(t, b):
    return jnp.where(t == 0, jnp.zeros_like(t), t / jnp.abs(b))  # |b|: t / -0 would have the wrong sign


def _batch(args, axes, *, zero):
    c, t = batch_axis_first(args, axes)
    if zero == "neither" and None in axes:
        # Until JAX 0.11: it makes a wrong dot product of x - (c * x).sum(-1, keepdims=True) on a CPU, with one c for a
        # whole batch (jaxlib 0.10.2). The maximum with a lower number, which is NaN where the product is, prevents it.
        zero = "neither, batched"
    return _mul0_p.bind(c, t, zero=zero), 0


def _transpose_t(ct, c, t, *, zero):
    return _mul0_p.bind(c, ct, zero="t" if zero == "t" else "either")


def _transpose_c(ct, c, t, *, zero):
    return _mul0_p.bind(ct, t, zero="t" if zero == "t" else "either")


def _types(*avals, **_):
    """Shape, dtype, sharding and varying manual axes are those of the ordinary product."""
    return mul_p.abstract_eval(*avals)[0]


_mul0_p = primitive(
    "mul0",
    _multiply_and_select,
    (lambda dc, c, t, **_: mul00(dc, t), lambda dt, c, t, **_: mul00(c, dt)),
    (_transpose_c, _transpose_t),
    _batch,
    types=_types,
)
# d(t/b) = dt/b - (t/b) db / b
_over_p = primitive(
    "over",
    _divide_and_select,
    (lambda dt, t, b: over(dt, b), lambda db, t, b: -over(mul00(over(t, b), db), b)),
    (lambda ct, t, b: over(ct, b),),
    types=_types,
)
