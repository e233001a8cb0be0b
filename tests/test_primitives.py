"""The features that `primitive` adds to every primitive, tested with a few small ones."""

import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jce._jax.primitives import derivative_inside, evaluated_jaxpr, primitive
from jce._jax.waiting import as_one

# k (x - y) w: linear in x and y. Its derivative with respect to w is defined as 0.
_difference_p = primitive(
    "difference",
    lambda x, y, w, *, k: k * (x - y) * w,
    (lambda t, x, y, w, k: difference(t, 0 * t, w, k), lambda t, x, y, w, k: difference(0 * t, t, w, k), None),
    (lambda ct, x, y, w, k: k * ct * w, lambda ct, x, y, w, k: -k * ct * w),
)
_inside_p = primitive("inside", evaluated_jaxpr, derivative_inside, several=True, holds_arrays=True)
_wave_p = primitive("wave", {None: jnp.cos, "cpu": jnp.sin}, (lambda t, x: t * _wave_p.bind(x),))


def difference(x, y, w, k=3):
    return _difference_p.bind(x, y, w, k=k)


def numbers(*shape):
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def test_values_and_types():
    x, y, w = numbers(3, 4), numbers(3, 4)[::-1], numbers(3, 4) / 8
    for function in (difference, jax.jit(difference, static_argnums=3)):
        np.testing.assert_array_equal(function(x, y, w, 2), 2 * (x - y) * w)
    assert jax.eval_shape(difference, x, y, w) == jax.ShapeDtypeStruct((3, 4), np.float32)


@pytest.mark.slow
def test_derivatives():
    x, y, w = numbers(4), 2 * numbers(4), numbers(4)[::-1]
    got = jax.jacfwd(difference, (0, 1, 2))(x, y, w)
    for g, expected in zip(got, (3 * np.diag(w), -3 * np.diag(w), np.zeros((4, 4))), strict=True):
        np.testing.assert_array_equal(g, expected)
    got = jax.grad(lambda *a: difference(*a).sum(), (0, 1, 2))(x, y, w)
    jax.tree.map(np.testing.assert_array_equal, got, (3 * w, -3 * w, 0 * w))


def test_transposing_an_unused_result():
    (got,) = jax.linear_transpose(lambda x: (difference(x, 2 * x, x + 1.0 - x), 5 * x)[1], numbers(3))(numbers(3))
    np.testing.assert_array_equal(got, 5 * numbers(3))


@pytest.mark.parametrize("axes", [a for a in itertools.product([None, 0, 1], repeat=3) if a != (None,) * 3], ids=str)
def test_batches(axes):
    members = [numbers(2, 3) * (i + 1) for i in range(3)]
    arrays = [m[0] if k is None else np.moveaxis(m, 0, k) for m, k in zip(members, axes, strict=True)]
    got = jax.vmap(difference, axes)(*arrays)
    x, y, w = (np.broadcast_to(m[:1], m.shape) if k is None else m for m, k in zip(members, axes, strict=True))
    np.testing.assert_array_equal(got, 3 * (x - y) * w)


def test_each_platform_lowers_its_own_function():
    with jax.disable_jit():
        np.testing.assert_allclose(_wave_p.bind(numbers(3)), np.sin(numbers(3)), rtol=1e-6)
    traced = jax.jit(lambda x: _wave_p.bind(x)).trace(numbers(3))
    for platform, function in (("cpu", "sine"), ("tpu", "cosine"), ("cuda", "cosine")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert [name for name in ("cosine", "sine") if f"stablehlo.{name} " in text] == [function]


@pytest.mark.slow
def test_no_cached_program_holds_an_array():
    def run():
        held = jnp.asarray(numbers(3))
        (got,) = _inside_p.bind(numbers(3), jaxpr=jax.make_jaxpr(lambda x: x * held)(numbers(3)))
        np.testing.assert_array_equal(got, numbers(3) ** 2)
        return weakref.ref(held)

    reference = run()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("axes", [(0, None), (1, 0)], ids=str)
@pytest.mark.in_turn(2)
def test_one_operation_stays_one_in_a_batch(axes):
    """The operation discards the NaN of 0 / 0, so checkify finds nothing."""

    def share(x, y):
        return jnp.where(y == 0, jnp.zeros_like(x), x / y), (x > y).sum()

    x, y = numbers(3, 3), numbers(3) - 1
    batched = jax.vmap(as_one(share), axes)
    error, got = checkify.checkify(jax.jit(batched), errors=checkify.float_checks)(x, y)
    assert error.get() is None
    jax.tree.map(np.testing.assert_array_equal, got, jax.vmap(share, axes)(x, y))
    assert checkify.checkify(jax.jit(jax.vmap(share, axes)), errors=checkify.float_checks)(x, y)[0].get()
