"""Jensen-Shannon divergences compared with entropies and KL divergences, and the effect of their weight β."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from tests.kernels import modes

DIVERGENCES = [jce.jensen_shannon_divergence, jce.jensen_shannon_divergence_with_logits]
each_divergence = pytest.mark.parametrize("function", DIVERGENCES, ids=lambda function: function.__name__)
MODES = modes(jnp.sum, ())
INF = np.inf
WEIGHTS = (1e-6, 0.01, 0.3, 0.5, 0.999)


@pytest.fixture
def distributions(rng):
    return (rng.dirichlet(np.ones(7), 100).astype(np.float32) for _ in range(2))


@pytest.mark.slow
def test_the_divergence_is_the_entropy_that_mixing_gains(distributions):
    p, q = distributions
    for beta in (0.2, 0.5):
        gained = jce.entropy(beta * p + (1 - beta) * q) - beta * jce.entropy(p) - (1 - beta) * jce.entropy(q)
        np.testing.assert_allclose(jce.jensen_shannon_divergence(p, q, beta=beta), gained, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            jce.jensen_shannon_divergence_with_logits(np.log(p), np.log(q), beta=beta), gained, rtol=1e-4, atol=1e-6
        )


def test_symmetry_bound_and_limit(distributions):
    p, q = distributions
    half = jce.jensen_shannon_divergence(p, q)
    np.testing.assert_allclose(half, jce.jensen_shannon_divergence(q, p), rtol=1e-6)
    assert (half <= float(np.log(2))).all()
    np.testing.assert_allclose(
        jce.jensen_shannon_divergence(p, q, beta=0.25), jce.jensen_shannon_divergence(q, p, beta=0.75), rtol=1e-6
    )
    q = (q + 0.1) / np.float32(1.7)
    limit = jce.jensen_shannon_divergence(p, q, beta=1e-6) / np.float32(1e-6)
    np.testing.assert_allclose(limit, jce.kl_divergence(p, q), rtol=1e-4)


@pytest.mark.parametrize("apart", [1e-5, 1e-2, 3])
@pytest.mark.slow
def test_accuracy_at_every_weight(apart, rng):
    x = 3 * rng.standard_normal((50, 9))
    x, y = np.float32(x), np.float32(x + apart * rng.standard_normal(x.shape))
    p, q = (np.asarray(jax.nn.softmax(z)) for z in (x, y))
    for function, pair in zip(DIVERGENCES, ((p, q), (x, y)), strict=True):
        for beta in WEIGHTS:
            beta = float(np.float32(beta))

            def both(p, q, function=function, beta=beta):
                total = lambda p, q: function(p, q, beta=beta).sum()  # noqa: E731
                return function(p, q, beta=beta), *jax.grad(total, (0, 1))(p, q)

            with jax.enable_x64(True):
                exact = list(map(np.asarray, both(*map(np.float64, pair))))
            for got, truth in zip(map(np.asarray, both(*pair)), exact, strict=True):
                scale = np.abs(truth) if truth.ndim == 1 else np.abs(truth).max(-1, keepdims=True)
                assert (np.abs(got - truth) <= 2e-6 * scale).all()


def plain(p, q, beta):
    m = beta * p + (1 - beta) * q
    return (beta * p * jnp.log(p / m) + (1 - beta) * q * jnp.log(q / m)).sum()


PLAIN = [plain, lambda x, y, beta: plain(jax.nn.softmax(x), jax.nn.softmax(y), beta)]


@each_divergence
@pytest.mark.parametrize(
    "mode", [x if x == "forward over reverse" else pytest.param(x, marks=pytest.mark.slow) for x in MODES]
)
def test_a_traced_weight_has_derivatives(function, mode, rng):
    """Derivatives in every mode equal those of the formula as written, in float64."""

    def made(f):
        return lambda p, q, z: f(p * p, jnp.exp(q), jax.nn.sigmoid(z))

    arguments = (*np.abs(rng.standard_normal((2, 5))) + 0.1, np.float64(0.3))
    directions = tuple(0.1 * rng.standard_normal(np.shape(x)) for x in arguments)
    with jax.enable_x64(True):
        got, expected = (
            jax.jit(modes(made(f), (0, 1, 2))[mode])(arguments, directions)
            for f in (lambda p, q, beta: function(p, q, beta=beta), PLAIN[DIVERGENCES.index(function)])
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), got, expected)


@each_divergence
@pytest.mark.slow
def test_weights_in_a_batch(function, rng):
    """Values, and derivatives with respect to the weight."""
    p, q = np.abs(rng.standard_normal((2, 5))).astype(np.float32)
    weights = np.float32(WEIGHTS)
    together, slopes = jax.vmap(jax.value_and_grad(lambda beta: function(p, q, beta=beta)))(weights)
    np.testing.assert_allclose(together, [function(p, q, beta=float(beta)) for beta in weights], rtol=2e-6)
    with jax.enable_x64(True):
        slope = jax.grad(PLAIN[DIVERGENCES.index(function)], 2)
        expected = [slope(np.float64(p), np.float64(q), np.float64(beta)) for beta in weights]
    np.testing.assert_allclose(slopes, expected, rtol=2e-5)


@each_divergence
@pytest.mark.parametrize("beta", [0, 1, 0.0, -0.5, 2, "half", 1e-50, 1 - 1e-9, float("nan")])
def test_a_wrong_weight_raises_an_error(function, beta):
    with pytest.raises(ValueError, match=rf"^{function.__name__}: beta must be .* got beta=.* use kl_divergence"):
        function(np.float32([0.5, 0.5]), np.float32([0.25, 0.75]), beta=beta)


def written(function, *distributions):
    """The distributions as the function's arguments."""
    p = [jnp.float32(p) for p in distributions]
    return p if function is jce.jensen_shannon_divergence else list(map(jnp.log, p))


@pytest.mark.parametrize("function", [DIVERGENCES[0], pytest.param(DIVERGENCES[1], marks=pytest.mark.slow)])
def test_a_class_absent_from_both_has_no_effect(function):
    """Values, and first and second derivatives, including those with respect to the weight, are the same."""
    longer, shorter = (written(function, *x) for x in ([[0.5, 0.5, 0], [0.25, 0.75, 0]], [[0.5, 0.5], [0.25, 0.75]]))
    along = lambda n: (jnp.arange(n, dtype=np.float32), -jnp.arange(n, dtype=np.float32), jnp.float32(0.3))  # noqa: E731

    @jax.jit
    def run(p, q):
        of_all = jax.value_and_grad(lambda p, q, beta: function(p, q, beta=beta), (0, 1, 2))
        return jax.jvp(of_all, (p, q, jnp.float32(0.4)), along(p.size))

    got = run(*longer)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(got))
    got = jax.tree.map(lambda x: x[:2] if x.ndim else x, got)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8), got, run(*shorter))


@each_divergence
@pytest.mark.slow
def test_a_traced_weight_of_0_or_1(function):
    """A tangent of 0 has no effect, even if derivatives are infinite."""

    def run(p, q, beta, zeros):
        f = lambda p, q, beta: function(p, q, beta=beta)  # noqa: E731
        (value, gradients), still = jax.jvp(jax.value_and_grad(f, (0, 1, 2)), (p, q, beta), zeros)
        return value, gradients, (still, jax.jvp(f, (p, q, beta), zeros)[1])

    program = jax.jit(run)
    for beta in np.float32([0, 1]):
        arguments = *written(function, [0.5, 0.5, 0], [0, 0.25, 0.75]), beta
        value, gradients, still = program(*arguments, tuple(map(np.zeros_like, arguments)))
        assert value == 0
        assert all((g == 0).all() for g in gradients[:2])
        assert gradients[2] == (INF if beta == 0 else -INF)  # KL(p‖q), or -KL(q‖p)
        assert all((t == 0).all() for t in jax.tree.leaves(still))
        p, q = written(function, [0.5, 0.5, 0], [0.25, 0.75, 0])
        _, (*_, slope), _ = program(p, q, beta, tuple(map(np.zeros_like, arguments)))
        p, q = np.float32([0.5, 0.5]), np.float32([0.25, 0.75])
        expected = jce.kl_divergence(p, q) if beta == 0 else -jce.kl_divergence(q, p)
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.in_turn(2)
def test_derivatives_of_distributions_far_apart(platform, rng):
    """If p is almost 0, log q/m is nearly log 1/(1-β), and the gradient comes from the small difference."""
    x, y = (10 * rng.standard_normal((2, 40, 5))).astype(np.float32)
    y[:, 0], x[:, 1] = y.max(-1) + 20, x.max(-1) + 20
    x[0], y[0] = [44, -20, 9, -41.5, 6], [70, 33, 2, 802, 18]

    def gradients(x, y):
        total = lambda x, y: jce.jensen_shannon_divergence_with_logits(x, y, beta=0.125).sum()  # noqa: E731
        return [np.asarray(g) for g in jax.grad(total, (0, 1))(x, y)]

    with jax.enable_x64(True):
        exact = gradients(np.float64(x), np.float64(y))
    for got, truth in zip(gradients(x, y), exact, strict=True):
        np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-32)


@pytest.mark.parametrize("form", ["probabilities", "logits"])
@pytest.mark.slow
def test_a_python_beta_near_1(form, rng):
    """Exchanging p and q exchanges β and 1-β, which are both computed in double precision."""
    x, y = rng.standard_normal((2, 20, 5)).astype(np.float32)
    function = jce.jensen_shannon_divergence_with_logits
    if form == "probabilities":
        function, x, y = jce.jensen_shannon_divergence, jax.nn.softmax(x), jax.nn.softmax(y)
    for beta in (0.999, 1 - 1e-6, 1 - 1e-7):
        np.testing.assert_allclose(function(x, y, beta=beta), function(y, x, beta=1 - beta), rtol=2e-6)


LACKING = [  # logits of p; logits of q, which lacks a class; and β, whose product with p at that class underflows
    ([0.0, -86.0], [0.0, -INF], 1e-8),
    ([36.62, -46.83, 6.61, 18.02], [-0.0063, -INF, -0.00996, -0.0085], 5.4e-19),
    ([0.0, -80.0], [0.0, -INF], 1e-37),
]


@pytest.mark.parametrize("case", LACKING, ids=str)
@pytest.mark.slow
def test_derivative_with_respect_to_a_weight_whose_product_underflows(case):
    """For logits and for probabilities, the derivative is finite and equals that in float64."""
    *logits, beta = case
    found = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            x, y = (np.asarray(np.float32(z), dtype) for z in logits)
            p, q = (jnp.asarray(np.float32(jax.nn.softmax(np.float64(z))), dtype) for z in logits)
            found.append(
                [
                    jax.grad(lambda b, f=f, a=a: f(*a, beta=b))(jnp.asarray(np.float32(beta), dtype))
                    for f, a in zip(reversed(DIVERGENCES), ((x, y), (p, q)), strict=True)
                ]
            )
    np.testing.assert_allclose(*found, rtol=2e-6)


@pytest.mark.slow
def test_mixed_derivatives_at_a_weight_of_0_and_1():
    """∂²/∂p∂β for probabilities, in either order and mode: ±∞ if the mixture lacks a class, or p is 0."""
    p, q = np.float32([0.5, 0.5, 0, 0]), np.float32([0, 0.5, 0.5, 0])
    expected = {  # log p/m - β (p - q)/m and -log q/m - (1-β) (p - q)/m
        0.0: ([INF, 0, -INF, 0], [-INF, 0, 1, 0]),
        1.0: ([-1, 0, INF, 0], [INF, 0, -INF, 0]),
    }
    for beta, both in expected.items():
        for i, derivatives in enumerate(both):

            def of(x, b, i=i):
                return jce.jensen_shannon_divergence(*((x, q) if i == 0 else (p, x)), beta=b)

            x, b = (p, q)[i], np.float32(beta)
            for mode in (jax.jacfwd, jax.jacrev):
                np.testing.assert_array_equal(mode(jax.grad(of, 1), 0)(x, b), derivatives)
                np.testing.assert_array_equal(mode(jax.grad(of, 0), 1)(x, b), derivatives)
