"""Identities and inequalities between the functions, such as KL = H(p, q) - H(p)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from jce._jax import platforms as _platforms
from tests.kernels import binary_regimes, probability_regimes
from tests.optimized_jit import optimized_jit

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(params=["dirichlet 1", "dirichlet 0.1", "zeros in p", "zeros in both", "near 0.01", "near 1e-05"])
def pair(request, rng):
    return probability_regimes(rng, (50, 20), np.float32)[request.param]


def test_kl_is_cross_entropy_minus_entropy(pair):
    p, q = pair
    scale = jce.cross_entropy(p, q) + jce.entropy(p)
    np.testing.assert_array_less(
        np.abs(jce.kl_divergence(p, q) - (jce.cross_entropy(p, q) - jce.entropy(p))), 8 * EPS * scale
    )


def test_entropy_is_not_negative_and_equals_cross_entropy_with_itself(pair):
    p, _ = pair
    assert (jce.entropy(p) >= 0).all()
    np.testing.assert_allclose(jce.cross_entropy(p, p), jce.entropy(p), rtol=4 * EPS)


def test_gibbs_inequality(pair):
    """KL ≥ 0 and H(p, q) ≥ H(p): exactly in the generalized form, and up to Σp - Σq if rounding moves sums off 1."""
    p, q = pair
    assert (jce.generalized_kl_divergence(p, q) >= 0).all()
    surplus = np.asarray(p.astype(np.float64).sum(-1) - q.astype(np.float64).sum(-1))
    kl = np.asarray(jce.kl_divergence(p, q), np.float64)
    generalized = np.asarray(jce.generalized_kl_divergence(p, q), np.float64)
    assert (kl - surplus >= -4 * EPS * (generalized + np.abs(surplus))).all()
    h, hpq = (np.asarray(x, np.float64) for x in (jce.entropy(p), jce.cross_entropy(p, q)))
    assert (hpq - h - surplus >= -4 * EPS * (h + hpq)).all()


def test_divergence_is_zero_only_at_equality(rng):
    """The generalized and the binary form are greater than 0 even if q is one ulp away in a single entry."""
    p, _ = probability_regimes(rng, (50, 20), np.float32)["dirichlet 1"]
    for divergence in (jce.kl_divergence, jce.generalized_kl_divergence):
        np.testing.assert_array_equal(divergence(p, p), np.zeros(50))
    q = p.copy()
    q[:, 3] = np.nextafter(q[:, 3], np.float32(2))
    assert (jce.generalized_kl_divergence(p, q) > 0).all()
    alpha, beta = binary_regimes(rng, (1000,), np.float32)["one ulp"]
    np.testing.assert_array_equal(jce.binary_kl_divergence(alpha, alpha), np.zeros(1000))
    assert (jce.binary_kl_divergence(alpha, beta) > 0).all()


def test_generalized_form_is_never_negative(rng):
    """The floats are non-negative, from one ulp apart to all pairs of binary exponents."""
    p = np.abs(rng.standard_normal(100_000)).astype(np.float32)
    for steps in range(1, 6):
        q = (p.view(np.int32) + steps).view(np.float32)
        assert (jce.generalized_kl_divergence(p[:, None], q[:, None]) > 0).all()
        assert (jce.generalized_kl_divergence(q[:, None], p[:, None]) > 0).all()
    powers = np.exp2(np.arange(-126, 127)).astype(np.float32)
    p, q = (x.ravel() for x in np.meshgrid(powers, powers * np.float32(1.5)))
    value = jce.generalized_kl_divergence(p[:, None], q[:, None])
    exact = p.astype(float) * np.log(p.astype(float) / q) - p + q
    assert (value >= 0).all()
    ordinary = (exact < np.finfo(np.float32).max / 4) & (p + q > 1e-36)  # others have subnormal intermediates
    np.testing.assert_allclose(value[ordinary], exact[ordinary], rtol=4 * EPS)
    log_ratio = optimized_jit(jax.grad(lambda p: jce.generalized_kl_divergence(p[:, None], q[:, None]).sum()))(p)
    exact = np.log(p.astype(float) / q)
    ordinary = (p + q > 1e-36) & (exact > -252 * np.log(2))
    np.testing.assert_allclose(log_ratio[ordinary], exact[ordinary], rtol=4 * EPS)


@pytest.mark.slow
def test_the_mean_of_a_sampled_divergence(rng):
    """The mean under p is KL(p‖q), and the gradients are those that the docstring states for each argument."""
    x, y = rng.standard_normal((2, 3))

    def drawn(x, y, once=True):
        """The mean over all outcomes. Its weights p are differentiated only if not `once`."""
        log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
        each = jce.sampled_kl_divergence(log_p, log_q)
        still = jax.lax.stop_gradient(log_p)
        return (jnp.exp(still) * each * (1 if once else jnp.exp(log_p - still))).sum()

    with jax.enable_x64(True):
        kl, both = jce.kl_divergence_with_logits, (0, 1)
        np.testing.assert_allclose(drawn(x, y), kl(x, y), rtol=1e-12)
        in_p, in_q = jax.grad(drawn, both)(x, y)
        np.testing.assert_allclose(in_q, jax.grad(kl, 1)(x, y), rtol=1e-10)
        np.testing.assert_allclose(in_p, jax.grad(kl, 1)(y, x), rtol=1e-10)
        weighted = jax.grad(drawn)(x, y, once=False)
        np.testing.assert_allclose(weighted, jax.grad(kl)(x, y), rtol=1e-10)
        assert np.abs(weighted - in_p).max() > 0.01


def test_a_sampled_divergence_is_0_only_at_equality(rng):
    """A sampled divergence is greater than 0 even if its arguments are one ulp apart, on either side."""
    a = -rng.exponential(3, 100_000).astype(np.float32)
    np.testing.assert_array_equal(jce.sampled_kl_divergence(a, a), 0 * a)
    for b in (np.nextafter(a, np.float32(1)), np.nextafter(a, np.float32(-1e9))):
        assert (jce.sampled_kl_divergence(a, b) > 0).all()


def test_cross_entropy_and_kl_are_not_symmetric():
    p, q = np.float32([0.5, 0.25, 0.25]), np.float32([0.125, 0.125, 0.75])
    for f in (jce.cross_entropy, jce.kl_divergence, jce.generalized_kl_divergence):
        assert abs(f(p, q) - f(q, p)) > 0.02
    for f in (jce.binary_cross_entropy, jce.binary_kl_divergence):
        assert abs(f(0.25, 0.5) - f(0.5, 0.25)) > 0.01


@pytest.mark.slow
def test_the_maximum_of_entropy_is_log_n_at_uniform(rng):
    for n in (1, 2, 10, 1000):
        uniform = np.full(n, 1 / n, np.float32)
        np.testing.assert_allclose(jce.entropy(uniform), np.log(n), rtol=1e-6, atol=1e-7)
        others = rng.dirichlet(np.ones(n), 20).astype(np.float32)
        assert (jce.entropy(others) <= float(np.log(n) * (1 + 1e-6) + 1e-7)).all()
    np.testing.assert_array_equal(jce.entropy(np.eye(5, dtype=np.float32)), np.zeros(5))
    assert not np.signbit(jce.entropy(np.eye(5, dtype=np.float32))).any()


def test_gradients_with_respect_to_q(rng):
    p, q = probability_regimes(rng, (50, 20), np.float32)["dirichlet 1"]
    gradient = jax.vmap(jax.grad(jce.cross_entropy, 1))(p, q)
    np.testing.assert_allclose(gradient, -p / q, rtol=EPS)
    alpha, beta = binary_regimes(rng, (1000,), np.float32)["uniform"]
    gradient = jax.vmap(jax.grad(jce.binary_cross_entropy, 1))(alpha, beta)
    alpha, beta = alpha.astype(np.float64), beta.astype(np.float64)
    np.testing.assert_allclose(gradient, (beta - alpha) / (beta * (1 - beta)), rtol=4 * EPS)


@pytest.mark.slow
def test_same_minimizer_over_q(rng):
    """H and KL have equal gradients on the simplex, both are 0 along it at q = p, and H(p, p) = H(p) is the minimum."""
    p, q = probability_regimes(rng, (50, 20), np.float32)["dirichlet 1"]
    h, kl = (jax.vmap(jax.grad(f, 1)) for f in (jce.cross_entropy, jce.kl_divergence))
    np.testing.assert_array_equal(h(p, q), kl(p, q))
    at_p = h(p, p)
    np.testing.assert_array_equal(at_p - at_p.mean(-1, keepdims=True), np.zeros_like(p))
    assert (jce.cross_entropy(p, q) >= jce.entropy(p)).all()
    softmax_gradient = jax.vmap(jax.grad(lambda z, p: jce.cross_entropy(p, jax.nn.softmax(z))))(jnp.log(p), p)
    np.testing.assert_allclose(softmax_gradient, np.zeros_like(p), atol=4 * EPS)


def test_gradient_through_the_softmax(rng):
    """∂H/∂z = q Σp - p at q = softmax(z), and β - α at β = σ(x)."""
    p, _ = probability_regimes(rng, (50, 20), np.float32)["dirichlet 1"]
    z = rng.standard_normal((50, 20)).astype(np.float32)
    gradient = jax.vmap(jax.grad(lambda z, p: jce.cross_entropy(p, jax.nn.softmax(z))))(z, p)
    np.testing.assert_allclose(gradient, jax.nn.softmax(z) - p, atol=4 * EPS)
    alpha, x = p[:, 0], z[:, 0]
    gradient = jax.vmap(jax.grad(lambda x, a: jce.binary_cross_entropy(a, jax.nn.sigmoid(x))))(x, alpha)
    np.testing.assert_allclose(gradient, jax.nn.sigmoid(x) - alpha, atol=4 * EPS)


@pytest.mark.parametrize("regime", ["uniform", "labels", "near 0.01", "near 1"])
def test_binary_equals_two_classes(regime, rng):
    alpha, beta = binary_regimes(rng, (1000,), np.float32)[regime]
    with jax.enable_x64(True):  # where 1 - α of a float32 α is exact
        p, q = (np.stack([x, 1 - x], -1) for x in (alpha.astype(np.float64), beta.astype(np.float64)))
        pairs = [
            (jce.binary_entropy(alpha), jce.entropy(p)),
            (jce.binary_cross_entropy(alpha, beta), jce.cross_entropy(p, q)),
            (jce.binary_kl_divergence(alpha, beta), jce.kl_divergence(p, q)),
        ]
    for binary, two_classes in pairs:
        np.testing.assert_allclose(binary, two_classes, rtol=4 * EPS, atol=1e-30)


def test_chain_rule_of_entropy(rng):
    """H of a product distribution is the sum of the entropies, and KL of two products is the sum of the divergences."""
    p, q = probability_regimes(rng, (2, 12), np.float32)["dirichlet 1"]
    product = [np.outer(x[0], x[1]).ravel() for x in (p, q)]
    np.testing.assert_allclose(jce.entropy(product[0]), jce.entropy(p).sum(), rtol=1e-6)
    np.testing.assert_allclose(jce.kl_divergence(*product), jce.kl_divergence(p, q).sum(), rtol=1e-5)


@pytest.mark.slow
def test_derivatives_at_a_subnormal_difference():
    """The derivatives are 1 - p/q and log p/q, for the smallest normal number p and q = 3/2 p."""
    p, q = np.float32(2.0**-126), np.float32(1.5 * 2.0**-126)
    for function in (jce.binary_cross_entropy, jce.binary_kl_divergence):
        np.testing.assert_allclose(jax.grad(function, 1)(p, q), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jce.binary_kl_divergence)(p, q), -np.log(1.5), rtol=1e-6)
    in_p, in_q = jax.grad(jce.generalized_kl_divergence, (0, 1))(p[None], q[None])
    np.testing.assert_allclose([in_p[0], in_q[0]], [-np.log(1.5), 1 / 3], rtol=1e-6)


def test_entropy_near_certainty():
    """If all of the entropy comes from one unlikely class, it is -p log p of that class."""
    p = np.array([2.0**-120, 1.0], np.float32)
    np.testing.assert_allclose(jce.entropy(p), 120 * np.log(2) * 2.0**-120, rtol=1e-6)


def value_and_gradient(function):
    return optimized_jit(lambda *x: (function(*x), *jax.grad(lambda *x: function(*x).sum(), tuple(range(len(x))))(*x)))


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["CPU", "GPU"])
@pytest.mark.in_turn(2, "wide")
def test_jensen_shannon_is_symmetric_to_the_bit(device, dtype, rng, monkeypatch):
    """Values and derivatives are symmetric, for distributions far apart or near, with classes absent from one or both.

    This isn't tested as on a TPU: there passes share m, and this CPU contracts operations that a TPU rounds separately.
    """
    monkeypatch.setattr(_platforms, "CPU", getattr(_platforms, device))
    jax.clear_caches()
    x = np.tile(3 * rng.standard_normal((40, 8)), (4, 1))
    y = x + np.repeat([1e-5, 1e-2, 1, 10], 40)[:, None] * rng.standard_normal(x.shape)
    x[::3, 1] = y[::4, 1] = x[::5, 2] = -np.inf
    distributions = [np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y)]
    with jax.enable_x64(dtype == np.float64):
        for function, pair in (
            (jce.jensen_shannon_divergence, distributions),
            (jce.jensen_shannon_divergence_with_logits, (x, y)),
        ):
            p, q = (z.astype(dtype) for z in pair)
            run = value_and_gradient(function)
            value, in_p, in_q = run(p, q)
            for got, exchanged in zip(run(q, p), (value, in_q, in_p), strict=True):
                np.testing.assert_array_equal(got, exchanged)
    jax.clear_caches()


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_the_complement_is_equal_to_the_bit(dtype, rng):
    """If 1-α is exact, α and 1-α give the same value, and so do logits x and -x. Derivatives change their signs."""
    a, b = (rng.integers(0, 2**12 + 1, (2, 2000)) / 2**12).astype(dtype)
    x, y = (5 * rng.standard_normal((2, 2000))).astype(dtype)
    y[::2] = x[::2] + y[::2] / dtype(1000)
    with jax.enable_x64(dtype == np.float64):
        for function, one, other in (
            (jce.binary_kl_divergence, (a, b), (1 - a, 1 - b)),
            (jce.binary_entropy_with_logits, (x,), (-x,)),
            (jce.binary_cross_entropy_with_logits, (a, x), (1 - a, -x)),
            (jce.binary_kl_divergence_with_logits, (x, y), (-x, -y)),
        ):
            (value, *slopes), (same, *opposite) = (value_and_gradient(function)(*z) for z in (one, other))
            np.testing.assert_array_equal(value, same)
            jax.tree.map(lambda s, o: np.testing.assert_array_equal(s, -o), slopes, opposite)
