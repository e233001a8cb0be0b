"""0 · anything = 0: the product and the quotient that closed-form derivatives need at the boundary.

At the boundary a partial derivative may be infinite (∂H/∂p = +∞ at p = 0), while the tangent or cotangent that
multiplies it is often exactly zero: it belongs to another row or to a masked class, or has a weight of 0. The limit
along such a direction is 0, but the IEEE product is NaN. Reverse mode couldn't transpose a rule with
`jnp.where(t == 0, ...)`, which isn't linear in t. So the product is a primitive that is declared to be bilinear. It
lowers to a multiply and a select.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.lax import mul_p

from jce._jax.layout import split_alike
from jce._jax.primitives import batch_axis_first, primitive
from jce._jax.varying import varying_alike


def mul0(c: Array, t: Array) -> Array:
    """c · t elementwise, and 0 where t = 0, whatever c is. c and t have the same shape and dtype. Linear in each."""
    return _bind(c, t, "t")


def mul00(c: Array, t: Array) -> Array:
    """c · t elementwise, and 0 where c = 0 or t = 0, whatever the other is.

    In a first derivative, only t can be exactly 0 while c is infinite, so mul0 compares only t with 0. In a second
    derivative, c has a tangent too, which may be 0 while t is infinite.
    """
    return _bind(c, t, "either")


def multiply(c: Array, t: Array) -> Array:
    """Plain c · t, whose derivatives and transposes use mul00. For sums, in which a select would cost a pass.

    It is NaN where one factor is 0 and the other infinite. The caller must avoid or replace this NaN.
    """
    return _bind(c, t, "neither")


def over(t: Array, b: Array) -> Array:
    """t / |b| elementwise, and 0 where t = 0, whatever b is. Linear in t.

    mul0(1/b, t) isn't enough. Its derivative with respect to b would first multiply two tangents, and then divide by
    b². If the tangents are as small as b, their product may underflow. Here each tangent is divided by b first.
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
        # Until JAX 0.11: on a CPU, it turns x - (c * x).sum(-1, keepdims=True), with one c for a whole batch, into a
        # wrong dot product (jaxlib 0.10.2). The maximum with a lower number prevents it. (This number is NaN where the
        # product is.)
        zero = "neither, batched"
    return _mul0_p.bind(c, t, zero=zero), 0


def _transpose_t(ct, c, t, *, zero):
    return _mul0_p.bind(c, ct, zero="t" if zero == "t" else "either")


def _transpose_c(ct, c, t, *, zero):
    return _mul0_p.bind(ct, t, zero="t" if zero == "t" else "either")


def _types(*avals, **_):
    """Shape, dtype, sharding and varying manual axes are the same as for the ordinary product."""
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
