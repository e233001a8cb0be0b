"""Results of plain JAX at edge cases. If a test fails, JAX has fixed the result, and a rule of jce may be removable."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.special import entr, rel_entr, xlogy

import jce
from tests.optimized_jit import optimized_jit
from tests.test_linear_map import limited

P, Q = np.float32([0.0, 1.0]), np.float32([0.5, 0.5])


@pytest.mark.holds_nan
def test_the_textbook_formula_is_nan_at_zero():
    assert np.isnan(-(P * jnp.log(P)).sum())
    assert jce.entropy(P) == 0


@pytest.mark.holds_nan
def test_the_textbook_gradient_is_nan_behind_a_where():
    def safe(p):
        return -jnp.where(p > 0, p * jnp.log(p), 0).sum()

    assert np.isnan(jax.grad(safe)(P)[0])
    assert jax.grad(jce.entropy)(P)[0] == np.inf


@pytest.mark.holds_nan
def test_entr_is_nan_in_forward_mode_beside_a_zero():
    assert np.isnan(jax.jacfwd(lambda p: entr(p).sum())(P)).any()
    np.testing.assert_array_equal(jax.jacfwd(jce.entropy)(P), [np.inf, -1])


@pytest.mark.holds_nan
@pytest.mark.slow
def test_xlogy_derivatives_at_zero_are_nan():
    assert np.isnan(jax.grad(xlogy, 1)(0.0, 0.0))
    assert jax.grad(jce.cross_entropy, 1)(np.zeros(1), np.zeros(1)) == 0


@pytest.mark.slow
def test_rel_entr_gradient_misses_the_infinity():
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    assert jax.grad(lambda q: rel_entr(one, q).sum())(zero) == 0
    assert jax.grad(jce.kl_divergence, 1)(one, zero) == -np.inf


@pytest.mark.holds_nan
def test_optax_kl_divergence_is_nan_at_a_zero_target():
    assert np.isnan(jax.grad(lambda p: optax.kl_divergence(jnp.log(Q), p))(P)[0])
    assert jax.grad(jce.kl_divergence)(P, Q)[0] == -np.inf


@pytest.mark.slow
def test_kl_of_near_distributions_is_noise(rng):
    p = rng.dirichlet(np.ones(32), 100)
    q = (p * (1 + 1e-5 * rng.standard_normal(p.shape))).astype(np.float32)
    p = p.astype(np.float32)
    wide = p.astype(np.float64)
    exact = (wide * np.log(wide / q) - wide + q).sum(-1)
    plain = np.asarray(rel_entr(p, q).sum(-1) - p.sum(-1) + q.sum(-1))
    assert (plain < 0).any()
    assert np.median(np.abs(plain - exact) / exact) > 0.9
    np.testing.assert_allclose(jce.generalized_kl_divergence(p, q), exact, rtol=1e-5)


@pytest.mark.needs_jit
def test_a_scan_loses_rules_in_second_derivatives():
    """Up to JAX 0.11, if the inner derivative is in reverse mode and the scan's body isn't checkpointed."""

    @jax.custom_jvp
    def seven(x):
        return 0 * x

    seven.defjvp(lambda x, t: (seven(*x), 7 * t[0]))

    @jax.custom_jvp
    def function(x):
        return x

    function.defjvp(lambda x, t: (function(*x), seven(*x) * t[0]))

    def second_derivative(body):
        return jax.grad(lambda x: jax.grad(lambda x: jax.lax.map(body, x).sum())(x).sum())(np.ones(1, np.float32))

    assert second_derivative(function) == (7 if jax.__version_info__ >= (0, 12) else 0)
    assert second_derivative(jax.checkpoint(function)) == 7


@pytest.mark.needs_jit
def test_a_rule_in_a_loop_must_not_close_over_a_traced_value():
    """See what `jce.linear_map` says about results for each token."""

    def loss(limit, x):
        return jax.lax.map(limited(limit), x).sum()

    with pytest.raises(TypeError, match=r"No constant handler|unexpected tracer"):
        jax.jit(jax.grad(loss, 1))(1.5, np.ones(3, np.float32))


@pytest.mark.needs_jit
def test_a_subnormal_bfloat16_is_inconsistent():
    """In one CPU program, x isn't equal to 0, but 1/x is infinite. This can make a derivative of jce NaN."""

    @optimized_jit
    def program(x):
        x = x.astype(jnp.float32)
        return x == 0, 1 / x

    is_zero, reciprocal = program(jnp.array(5.9e-39, jnp.bfloat16))
    assert not is_zero
    assert np.isinf(reciprocal)


@pytest.mark.holds_nan
@pytest.mark.needs_jit
def test_differentiating_a_custom_rule_ends_debug_nans():
    """Then compiled calls ignore the process's setting. They obey jax.debug_nans(True), as in tests/conftest.py."""
    double = optimized_jit(lambda x: 2 * x)
    double(0.0)  # JAX checks compiled calls elsewhere than calls being compiled

    def is_noticed():
        try:
            return bool(np.isfinite(double(np.nan)))
        except FloatingPointError:
            return True

    def before_after_and_within():
        yield is_noticed()
        jax.grad(jce.binary_entropy)(0.5)
        yield is_noticed()
        with jax.debug_nans(True):
            jax.grad(jce.binary_entropy)(0.25)
            yield is_noticed()

    jax.config.update("jax_debug_nans", True)
    try:
        with ThreadPoolExecutor(1) as thread:  # nothing is set in this thread yet
            assert thread.submit(list, before_after_and_within()).result() == [True, False, True]
    finally:
        jax.config.update("jax_debug_nans", False)
