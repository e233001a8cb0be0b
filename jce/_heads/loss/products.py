"""`Head`, and the matmuls with it.

On an accelerator, a float32 matmul takes at least twice as long as a bfloat16 matmul. So if hidden states and head are
bfloat16, a derivative with respect to logits may be rounded to bfloat16 before it is multiplied with them. Each token's
derivative is first divided by its largest entry, the label's. That entry becomes ±1, which is exact in bfloat16, and
the other entries still add up to it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jce._jax.arguments import float_dtype
from jce._jax.platforms import Platform
from jce._jax.primitives import batch_axis_first, primitive
from jce._jax.varying import varying_alike


class Head(NamedTuple):
    """W [n, d] and b [n]. There are two arrays for W: `weight`, and `wide`, which has the dtype of the logits.

    The gradient of W is the gradient of `wide`. So if W is bfloat16, a loop over chunks sums its gradient in float32:
    matmuls read `weight`, and `wide` only receives the gradient. If the dtypes are the same, the arrays are equal, and
    matmuls read `wide`.
    """

    weight: Array
    wide: Array
    bias: Array

    @property
    def logits(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the logits of one token."""
        return jax.ShapeDtypeStruct(self.bias.shape, self.bias.dtype)


def head_of(name: str, h: Array, w: Array, b: Array | None) -> tuple[Array, Head]:
    """Hidden states and head, ready for the matmul. A head without classes is replaced by one class with logit 0."""
    dtype = float_dtype(name, {"hidden": h, "head": w} | ({} if b is None else {"bias": b}))
    b = jnp.zeros(w.shape[0], dtype) if b is None else b.astype(dtype)
    if w.shape[0] == 0:
        w, b = jnp.zeros((1, w.shape[1]), w.dtype), jnp.zeros(1, dtype)
    h, w = _stored(h, dtype), _stored(w, dtype)
    return h, Head(lax.stop_gradient(w), w.astype(dtype), b)


def _stored(x: Array, dtype) -> Array:
    """x in this dtype. If it is float32, a half-precision x stays as it is, since its matmuls accumulate in float32."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) and dtype == jnp.float32 else x.astype(dtype)


class Products(NamedTuple):
    """The settings of matmuls. Static. If `narrow`, both factors of every matmul are rounded to bfloat16."""

    precision: Any
    narrow: bool = False

    @classmethod
    def checked(cls, name: str, precision: Any) -> Products:
        known = lax.Precision | lax.DotAlgorithm | lax.DotAlgorithmPreset
        if precision is not None and not isinstance(precision, known):
            number = jax.ShapeDtypeStruct((), jnp.float32)
            try:  # JAX checks whether the name is allowed
                jax.eval_shape(functools.partial(jnp.dot, precision=precision), number, number)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name}: precision must be None, a jax.lax.Precision or DotAlgorithmPreset, or its name, such"
                    f' as "default" or "highest"; got precision={precision!r}. Omit it for JAX\'s setting.'
                ) from None
        return cls(precision)

    def on(self, platform: Platform, hidden: Array, weight: Array) -> Products:
        """The same settings, and `narrow` on an accelerator if both arrays are bfloat16 and no precision is set. With
        float16 arrays they are not narrow, since the range of float16 is too small for derivatives."""
        setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        asked = self.precision is not None or setting is not None
        return self._replace(narrow=not platform.is_cpu and not asked and hidden.dtype == weight.dtype == jnp.bfloat16)

    def dot(self, a: Array, b: Array, axis_a: int, axis_b: int, dtype) -> Array:
        """a · b, summed over an axis of each, accumulated and returned in `dtype`. If the dtypes of a and b differ,
        both are first cast to `dtype`."""
        if self.narrow:
            return _narrow(a, b, axis_a, axis_b)
        common = a.dtype if a.dtype == b.dtype else dtype
        return _dot(a.astype(common), b.astype(common), axis_a, axis_b, dtype, self.precision)

    def with_head(self, a: Array, head: Head, axis: int) -> Array:
        """a · W, summed over the last axis of a and an axis of W."""
        if head.weight.dtype == head.wide.dtype:
            return self.dot(a, head.wide, 1, axis, head.wide.dtype)
        return _product(a, head.weight, head.wide, axis, self)


def _dot(a, b, axis_a, axis_b, dtype, precision=None):
    contract = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=dtype)


# The primitive a · W, where both may have batch axes. It reads `weight`, but is declared linear in a and `wide`. So its
# transpose with respect to a, and its batched form, are again matmuls with `weight`. The gradient of the head goes to
# `wide`.


def _product(a, weight, wide, axis, products):
    if products.precision is None:  # JAX's setting is read while tracing, as for any matmul
        setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        products = products._replace(precision=setting)
    return _product_p.bind(*varying_alike(a, weight, wide), axis=axis, products=products)


def _multiply(a, weight, wide, *, axis, products):
    def function(a, weight):
        return products.dot(a, weight, 1, axis, wide.dtype)

    for _ in weight.shape[2:]:
        function = jax.vmap(function)
    return function(a, weight)


def _product_transpose(ct, a, weight, wide, *, axis, products):
    largest, ct = _scaled(ct) if products.narrow and axis == 1 else (1, ct)
    return (largest * _product(ct, weight, wide, 1 - axis, products)).astype(a.aval.dtype)


def _product_batch(arguments, axes, **static):
    a, weight, wide = arguments
    if axes[1:] == (None, None) and weight.ndim == 2:  # one head for the whole batch: merge its tokens
        a = jnp.moveaxis(a, axes[0], 0)
        result = _product(a.reshape(-1, a.shape[-1]), weight, wide, **static)
        return result.reshape(*a.shape[:-1], -1), 0
    return _product(*batch_axis_first(arguments, axes), **static), 0


_product_p = primitive(
    "product_with_head",
    _multiply,
    (
        lambda da, a, weight, wide, **static: _product(da, weight, wide, **static),
        None,
        lambda dwide, a, weight, wide, **static: _multiply(a, dwide, dwide, **static),
    ),
    (_product_transpose,),
    _product_batch,
)


# The narrow matmul is declared bilinear, although it rounds its factors. Its derivatives are narrow matmuls too.


def _narrow(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return _narrow_p.bind(*varying_alike(a, b), axis_a=axis_a, axis_b=axis_b)


def _round_and_multiply(a, b, *, axis_a, axis_b):
    return _dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), axis_a, axis_b, jnp.float32)


def _transpose_a(ct, a, b, *, axis_a, axis_b):
    a = a.aval
    if (axis_a, axis_b) == (1, 1):
        largest, ct = _scaled(ct)
        return (largest * _narrow(ct, b, 1, 0)).astype(a.dtype)
    result = _narrow(ct, b, 1, 1) if axis_a == 1 else _narrow(b, ct, 1 - axis_b, 1)
    return result.astype(a.dtype)


def _transpose_b(ct, a, b, *, axis_a, axis_b):
    b = b.aval
    if (axis_a, axis_b) == (1, 1):
        largest, ct = _scaled(ct)
        return _narrow(ct, largest * a.astype(largest.dtype), 0, 0).astype(b.dtype)
    result = _narrow(ct, a, 0, 1) if axis_b == 1 else _narrow(a, ct, 1 - axis_a, 0)
    return result.astype(b.dtype)


def _scaled(ct):
    """For a derivative with respect to logits [..., C, n]: the largest magnitude per token [..., C, 1], and the
    derivative divided by it."""
    largest = jnp.maximum(jnp.abs(lax.stop_gradient(ct)).max(-1, keepdims=True), jnp.finfo(ct.dtype).tiny)
    return largest, ct * (1 / largest)


_narrow_p = primitive(
    "narrow_dot",
    _round_and_multiply,
    (lambda da, a, b, **static: _narrow(da, b, **static), lambda db, a, b, **static: _narrow(a, db, **static)),
    (_transpose_a, _transpose_b),
    lambda arrays, axes, **static: (jax.vmap(functools.partial(_round_and_multiply, **static), axes)(*arrays), 0),
)
