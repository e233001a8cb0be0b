"""`linear_log_probs` with k labels, a tail, log Z and a temperature, against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jce
from tests.test_linear_cost import matrices

TOKENS, WIDTH, CLASSES, K, CAP = 7, 4, 11, 3, 5.0
INF = np.inf


@pytest.fixture
def problem(rng):
    """k distinct labels, hidden states, a head and a bias that forbids a class, and a temperature for each token."""
    labels = np.stack([rng.permutation(np.arange(1, CLASSES))[:K] for _ in range(TOKENS)])
    h, w, b = (rng.standard_normal(shape) for shape in ((TOKENS, WIDTH), (CLASSES, WIDTH), CLASSES))
    b[0] = -INF
    return labels, h, w, b, rng.uniform(0.3, 2, TOKENS)


def by_hand(labels, h, w, b, t, tail):
    """The formulas as written, for all classes except the forbidden one."""
    x = CAP * jnp.tanh((h @ w[1:].T + b[None, 1:]) / CAP) / jnp.broadcast_to(t, (TOKENS,))[:, None]
    log_q = jax.nn.log_softmax(x)
    at = jnp.take_along_axis(log_q, labels.reshape(TOKENS, -1) - 1, 1)
    if tail:
        at = jnp.concatenate([at, jnp.log1p(-jnp.exp(at).sum(-1, keepdims=True))], 1)
    at = at if labels.ndim == 2 else at[:, 0]
    return at, -(jnp.exp(log_q) * log_q).sum(-1), jax.nn.logsumexp(x, -1)


def scalar(results):
    """A number that depends on every result."""
    return sum(jnp.sin(x).sum() for x in results)


@pytest.mark.parametrize("of_each", [False, True], ids=["for all", "for each"])
@pytest.mark.parametrize("of", ["one", "some", "and a tail"])
@pytest.mark.in_turn(6)
def test_values_and_derivatives(of, of_each, problem):
    """Values, and derivatives of order 1 and 2 with respect to all arguments, with a padded last chunk."""
    labels, h, w, b, t = problem
    labels, t, tail = labels[:, 0] if of == "one" else labels, t if of_each else t[0], of == "and a tail"
    with jax.enable_x64(True):
        options = {"tail": tail, "log_normalizer": True, "logit_soft_cap": CAP, "chunk_size": 3}

        def ours(h, w, b, t):
            return jce.linear_log_probs(labels, h, w, b, temperature=t, **options)

        def expected(h, w, b, t):
            return by_hand(labels, h, w, b, t, tail)

        def everything(f):
            def gradients(*a):
                return jax.grad(lambda *a: scalar(f(*a)), (0, 1, 2, 3))(*a)

            def run(*a):
                still = jnp.zeros_like(a[2])
                return f(*a), gradients(*a), jax.jvp(gradients, a, (a[0], a[1], still, jnp.ones_like(a[3])))[1]

            return jax.jit(run)

        a = tuple(map(jnp.asarray, (h, w, b, t)))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11),
            jax.tree.leaves(everything(ours)(*a)),
            jax.tree.leaves(everything(expected)(*a)),
        )


@pytest.mark.holds_nan
def test_an_invalid_label_makes_only_its_own_entry_nan(problem):
    labels, h, w, b, _ = problem
    labels[0, 1], labels[1, 0] = -1, CLASSES
    log_prob, entropy = jce.linear_log_probs(labels, h, w, b)
    wrong = np.zeros(labels.shape, bool)
    wrong[0, 1] = wrong[1, 0] = True
    np.testing.assert_array_equal(np.isnan(log_prob), wrong)
    assert np.isfinite(entropy).all()


def test_a_divergence_of_k_classes_and_a_tail(problem):
    """For a teacher stored as k + 1 log-probabilities, KL is at least 0, is 0 at equality, and equals the formula."""
    labels, h, w, b, t = problem

    def log_probs(h):
        return jce.linear_log_probs(labels, h, w, b, temperature=t, tail=True, chunk_size=3).log_prob

    teacher = log_probs(h)
    divergence = jax.jit(lambda h: jce.kl_divergence_with_logits(teacher, log_probs(h)))
    np.testing.assert_array_equal(divergence(h), 0)
    near = divergence(h + 1e-3 * h[::-1])
    assert (near > 0).all()
    p, q = (np.exp(np.float64(z)) for z in (teacher, log_probs(h + 1e-3 * h[::-1])))
    np.testing.assert_allclose(near, (p * np.log(p / q) - p + q).sum(-1), rtol=2e-2)


@pytest.mark.needs_jit
@pytest.mark.slow
def test_unused_results_cost_nothing():
    """The compiled program has no exponentials for unused results. log Z uses the exponentials of the entropy."""

    def cost(use, **options):
        program = jax.jit(lambda h, w: use(jce.linear_log_probs(np.zeros(64, int), h, w, chunk_size=64, **options)))
        return program.lower(*matrices(64, 8, 256)).compile().cost_analysis()

    def transcendentals(use, **options):
        return cost(use, **options)["transcendentals"]

    def alone(function):
        program = jax.jit(lambda h, w: jce.linear_map(function, jce.Linear(h, w), chunk_size=64))
        return program.lower(*matrices(64, 8, 256)).compile().cost_analysis()["transcendentals"]

    of_log_prob = transcendentals(lambda both: both.log_prob)
    assert 64 * 256 <= of_log_prob < 1.02 * 64 * 256
    assert of_log_prob < transcendentals(tuple)
    assert transcendentals(lambda both: both.entropy) == alone(jce.entropy_with_logits) < transcendentals(tuple)
    assert transcendentals(tuple) == transcendentals(tuple, log_normalizer=True)
    two, two_of_three = cost(tuple), cost(lambda r: (r.log_prob, r.entropy), log_normalizer=True)
    for measure in ("transcendentals", "flops", "bytes accessed"):
        assert two[measure] == two_of_three[measure]


@pytest.mark.slow
def test_log_normalizer(problem):
    """Asking for log Z doesn't change other results. A masked token with NaN has log Z = 0 and derivative 0."""
    labels, h, w, b, t = problem
    two = jce.linear_log_probs(labels, h, w, b, temperature=t)
    assert len(two) == 2
    with pytest.raises(AttributeError, match="log_normalizer=True"):
        _ = two.log_normalizer
    three = jce.linear_log_probs(labels, h, w, b, temperature=t, log_normalizer=True)
    assert three._fields == ("log_prob", "entropy", "log_normalizer")
    np.testing.assert_array_equal(three.log_prob, two.log_prob)
    np.testing.assert_array_equal(three.entropy, two.entropy)
    h[2], kept = np.nan, np.arange(TOKENS) != 2

    def log_z(h):
        return jce.linear_log_probs(labels, h, w, b, where=kept, temperature=t, log_normalizer=True).log_normalizer

    np.testing.assert_array_equal(log_z(h), np.where(kept, three.log_normalizer, 0))
    gradient = jax.grad(lambda h: log_z(h).sum())(h)
    assert (gradient[2] == 0).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"temperature": np.ones(3)}, ValueError, "temperature must broadcast to the token axes"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
        ({"temperature": np.ones(TOKENS, complex)}, TypeError, "temperature"),
        ({"tail": True, "labels": np.zeros(TOKENS, int)}, ValueError, r"labels must have an axis for k labels"),
        ({"labels": np.zeros((TOKENS, 2, 1), int)}, ValueError, r"or these axes and a last axis for k labels"),
    ],
)
def test_wrong_arguments(options, error, says, problem):
    labels, h, w, b, _ = problem
    with pytest.raises(error, match=says):
        jce.linear_log_probs(**{"labels": labels, "hidden": h, "head": w, "bias": b} | options)


@pytest.mark.parametrize("of_each", [False, True], ids=["for all", "for each"])
@pytest.mark.slow
def test_on_a_mesh(of_each, rng):
    """Tokens and classes are each split over two devices. Values and gradients equal those of one device."""
    mesh = jax.make_mesh((2, 2), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    h, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, WIDTH), (12, WIDTH)))
    labels = np.stack([rng.permutation(12)[:K] for _ in range(8)])
    t = np.linspace(0.5, 2, 8, dtype=np.float32) if of_each else np.float32(0.7)

    def run(function):
        def results(h, w, t):
            return function(labels, h, w, temperature=t, tail=True, log_normalizer=True, chunk_size=2)

        return jax.jit(lambda *a: (results(*a), jax.grad(lambda *a: scalar(results(*a)), (0, 1, 2))(*a)))(h, w, t)

    split = jce.on_mesh(jce.linear_log_probs, mesh=mesh, token_axis="tokens", class_axis="classes")
    for x, y in zip(*(jax.tree.leaves(run(f)) for f in (split, jce.linear_log_probs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
