"""Tests of the low-level functions on which the kernels are built."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

import jce
from jce._jax.classes import Classes
from jce._jax.row_sum import row_sum
from jce._numerics.calculus import ratio
from jce._numerics.deviance import deviance_from_log
from jce._numerics.elementary import ATANH_TAIL, log1p, log1p_unit, log_complement
from jce._numerics.mul0 import mul0, mul00, multiply
from jce._quantities.binary_kl_divergence_with_logits import FARTHEST, QUADRATURE
from jce._softmax.passes import Passes
from tests.kernels import ROWS
from tests.optimized_jit import optimized_jit


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 28), ("float64", 53)])
@pytest.mark.slow
def test_atanh_tail_coefficients(dtype, bits):
    """The table approximates the series that its comment states, to 28 bits for float32 and to 53 for float64."""
    with mp.workprec(300):
        for k in range(101):
            v2 = mp.mpf(k) / 400
            exact = mp.nsum(lambda i, v2=v2: v2**i / (2 * i + 3), [0, mp.inf]) if v2 else mp.mpf(1) / 3
            got = functools.reduce(lambda s, c, v2=v2: s * v2 + mp.mpf(c), ATANH_TAIL[np.dtype(dtype)], mp.mpf(0))
            assert abs(got / exact - 1) < mp.mpf(2) ** -bits


def test_quotients_beyond_the_float_range():
    """Weights may be any numbers. In float32, 1e30 / 1e-30 overflows and 1e-30 / 1e30 underflows."""
    grid = np.meshgrid([1e-37, 1e-30, 1.0, 1e30, 1e35], [2e-37, 3e-30, 4.0, 2e30])
    p, q = (x.astype(np.float32).reshape(-1, 1) for x in grid)
    values, gradients = optimized_jit(jax.vmap(jax.value_and_grad(jce.generalized_kl_divergence)))(p, q)
    p, q = np.float64(p), np.float64(q)
    np.testing.assert_allclose(values, (p * np.log(p / q) - p + q)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(gradients, np.log(p / q), rtol=1e-6)


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.slow
def test_sum_of_differences_is_exact(near, rng):
    """Σp - Σq, which is 0 except for rounding, is accurate to an ulp if each p - q is exact, and otherwise to 2⁻⁴⁵."""
    for n in (2, 7, 1000, 100_000):
        p, q = (rng.dirichlet(np.ones(n), 3).astype(np.float32) for _ in range(2))
        if near:
            q = (p * (1 + 1e-3 * rng.standard_normal(p.shape))).astype(np.float32)
        exact = [mp.fsum(map(mp.mpf, (*map(float, a), *map(float, -b)))) for a, b in zip(p, q, strict=True)]
        backend = Passes.of(Classes(-1), p)
        p, q = backend.fold(p), backend.fold(q)
        got = optimized_jit(lambda p, q, backend=backend: backend.sum_with_differences(jnp.zeros_like(p), p, q))(p, q)
        np.testing.assert_allclose(got, np.array(exact, float), rtol=1.2e-7, atol=0 if near else 2**-45)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.in_turn(2)
def test_log1p_unit(dtype, rng):
    """Results are accurate down to the smallest normal number, and none is flushed to 0."""
    smallest = np.finfo(dtype).tiny * np.array([1, 1.25, 1.75, 2])
    e = np.concatenate([smallest, rng.random(500), 10 ** rng.uniform(-37, 0, 500), [0, 1]]).astype(dtype)
    with jax.enable_x64(dtype == np.float64), mp.workprec(200):
        got = optimized_jit(log1p_unit)(e)
        exact = [mp.log1p(mp.mpf(float(v))) for v in e]
    np.testing.assert_allclose(got, np.array(exact, float), rtol=2 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.in_turn(2)
def test_log1p(dtype, rng):
    """Value and derivative, from 0 to numbers so large that adding 1 has no effect."""
    s = np.concatenate([[0], 0.41421356 + 1e-3 * rng.standard_normal(500), 10 ** rng.uniform(-30, 30, 1000)])
    s = s.astype(dtype)
    with jax.enable_x64(dtype == np.float64), mp.workprec(300):
        got, slope = optimized_jit(jax.vmap(jax.value_and_grad(log1p)))(s)
        exact = [mp.log1p(mp.mpf(float(v))) for v in s]
    np.testing.assert_allclose(got, np.array(exact, float), rtol=1.7 * np.finfo(dtype).eps, atol=0)
    np.testing.assert_allclose(slope, 1 / (1 + np.float64(s)), rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quadrature(dtype):
    """∫ (1-s) sᵏ ds = 1/((k+1)(k+2)) is exact for all k below twice the number of points.

    The divergence is accurate at logits that are as far apart as the quadrature is used for.
    """
    places, weights = np.array(QUADRATURE[np.dtype(dtype)]).T
    k = np.arange(2 * len(places))
    np.testing.assert_allclose((weights * places ** k[:, None]).sum(1), 1 / ((k + 1) * (k + 2)), rtol=1e-13)
    x = np.linspace(-3, 1, 9).astype(dtype)
    y = np.nextafter(x + dtype(FARTHEST), x)
    kl = ROWS["binary_kl_divergence_with_logits"].formula
    with jax.enable_x64(dtype == np.float64), mp.workprec(200):
        got = jce.binary_kl_divergence_with_logits(x, y)
        exact = [kl(mp.mpf(float(a)), mp.mpf(float(b))) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(got, np.array(exact, float), rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.slow
def test_log_complement(dtype, rng):
    x = np.concatenate([rng.random(500), 10 ** rng.uniform(-30, 0, 500), 0.41421356 + 1e-3 * rng.standard_normal(500)])
    x = x.astype(dtype)
    with jax.enable_x64(dtype == np.float64), mp.workprec(200):
        got = optimized_jit(log_complement)(x)
        exact = [mp.log(1 - mp.mpf(float(v))) for v in x]
        errors = [abs(mp.mpf(float(g)) / e - 1) for g, e in zip(got, exact, strict=True)]
    assert max(errors) < 2 * np.finfo(dtype).eps


def test_deviance_from_log_on_both_sides_of_its_change_of_formula():
    size = np.linspace(1, 2.5, 31)  # the formula changes at 1.5
    delta = np.float32([*-size, *size])
    q = np.float32(np.exp(np.float64(delta)))
    got = deviance_from_log(jnp.ones_like(delta), q, delta)
    np.testing.assert_allclose(got, np.expm1(np.float64(delta)) - delta, rtol=4 * np.finfo(np.float32).eps)


def test_row_sum_equals_sum(rng):
    """Sums along every axis, under vmap over every axis, and their gradients equal those of jnp.sum."""
    x = rng.integers(0, 9, (1, 3, 1, 4)).astype(np.float32)

    def each(total, x):
        mapped = [jax.vmap(lambda x, axis=axis: total(x, axis), k)(x) for axis in range(-3, 0) for k in range(4)]
        return mapped, [jax.grad(lambda x, axis=axis: jnp.square(total(x, axis)).sum())(x) for axis in range(4)]

    got, expected = (jax.jit(functools.partial(each, total))(x) for total in (row_sum, jnp.sum))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.holds_nan
def test_mul0():
    c = jnp.array([jnp.inf, jnp.nan, 2.0, jnp.inf])
    t = jnp.array([0.0, 0.0, 3.0, 1.0])
    expected = np.array([0, 0, 6, np.inf], np.float32)
    np.testing.assert_array_equal(mul0(c, t), expected)
    np.testing.assert_array_equal(optimized_jit(mul0)(c, t), expected)
    np.testing.assert_array_equal(jax.vmap(mul0)(c, t), expected)
    np.testing.assert_array_equal(jax.vmap(mul0, (None, 0))(c, jnp.stack([t, t])), [expected, expected])
    np.testing.assert_array_equal(jax.vmap(mul0, (1, None), 1)(jnp.stack([c, c], 1), t), np.stack([expected] * 2, 1))


@pytest.mark.holds_nan
def test_mul0_does_not_hide_a_nan_or_infinite_direction():
    np.testing.assert_array_equal(mul0(jnp.zeros(2), jnp.array([jnp.inf, jnp.nan])), [np.nan, np.nan])


def test_mul0_is_bilinear():
    c, t = jnp.array([2.0, jnp.inf]), jnp.array([3.0, 1.0])
    transpose = jax.linear_transpose(lambda t: mul0(c, t), t)
    np.testing.assert_array_equal(transpose(jnp.array([5.0, 0.0]))[0], [10, 0])
    transpose = jax.linear_transpose(lambda c: mul0(c, t), c)
    np.testing.assert_array_equal(transpose(jnp.array([5.0, 7.0]))[0], [15, 7])
    transpose = jax.linear_transpose(lambda c: mul0(c, jnp.zeros(2)), c)
    np.testing.assert_array_equal(transpose(jnp.array([jnp.inf, 0.0]))[0], [0, 0])
    _, tangent = jax.jvp(mul0, (c, t), (jnp.array([1.0, 0.0]), jnp.array([10.0, 0.0])))
    np.testing.assert_array_equal(tangent, [23, 0])


@pytest.mark.holds_nan
def test_transposes_of_products():
    """In these transposes, 0 · ∞ is NaN for mul0, and 0 for mul00 and multiply."""
    zero, inf = jnp.zeros(1), jnp.full(1, jnp.inf)
    for function, expected in ((mul0, np.nan), (mul00, 0), (multiply, 0)):
        (in_c,) = jax.linear_transpose(lambda c, f=function: f(c, inf), zero)(zero)
        (in_t,) = jax.linear_transpose(lambda t, f=function: f(zero, t), zero)(inf)
        np.testing.assert_array_equal([in_c, in_t], [[expected], [expected]])


@pytest.mark.holds_nan
@pytest.mark.slow
def test_ratio_at_zero_to_third_order():
    """0/0 is 0 with derivatives of 0, and 1/0 is ∞ with infinite derivatives. No derivative is NaN."""
    derivative, zero, one = ratio, jnp.zeros(()), jnp.ones(())
    for order in range(1, 4):
        derivative = jax.jacfwd(derivative, 1)
        assert derivative(zero, zero) == 0
        assert derivative(one, zero) == (-1) ** order * np.inf
    np.testing.assert_array_equal(jax.hessian(ratio, (0, 1))(zero, zero), np.zeros((2, 2)))
