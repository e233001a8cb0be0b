"""The temperature of heads, in losses and log-probabilities: accuracy, edge cases, meshes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jce
from tests.kernels import modes
from tests.optimized_jit import optimized_jit

SECOND = ("forward over reverse", "reverse over forward", "reverse over reverse")
TOKENS, WIDTH, CLASSES = 7, 4, 11
OF_EACH = pytest.mark.parametrize("of_each", [False, True], ids=["for all", "for each"])


@pytest.fixture
def problem(rng):
    """Labels, hidden states, a head, a bias that forbids a class, and one temperature per token."""
    labels = rng.integers(1, CLASSES, TOKENS)
    h, w, b = (rng.standard_normal(shape) for shape in ((TOKENS, WIDTH), (CLASSES, WIDTH), CLASSES))
    b[0] = -np.inf
    return labels, h, w, b, rng.uniform(0.3, 2, TOKENS)


@OF_EACH
@pytest.mark.in_turn(2)
def test_a_common_offset_of_the_logits_costs_no_accuracy(of_each, problem):
    """With an offset of 100 at T = 0.7, rounding x/T would cost some 60 ulps."""
    labels, h, w, b, *_ = problem
    t = np.float32(0.7) * np.ones(TOKENS if of_each else (), np.float32)
    b = np.float32(np.where(np.isinf(b), 100, np.round(8 * b) / 8 + 100))
    h, w = (np.float32(np.round(8 * x) / 8) for x in (h, w))  # matmuls are then exact

    def log_prob(t, h):
        return jce.linear_log_probs(labels, h, w, b, temperature=t).log_prob

    def surprisals(t, h):
        return jce.linear_cross_entropy(labels, h, w, b, temperature=t, reduction="none")

    def total(t, h):
        return jce.linear_cross_entropy(labels, h, w, b, temperature=t, reduction="sum")

    x = np.float64(h) @ np.float64(w).T + np.float64(b)
    x -= x.max(-1, keepdims=True)
    exact_t = np.float64(np.float32(0.7))
    q = np.exp(x / exact_t) / np.exp(x / exact_t).sum(-1, keepdims=True)
    exact = -np.log(np.take_along_axis(q, labels[:, None], 1))[:, 0]
    along_t = (np.take_along_axis(x, labels[:, None], 1)[:, 0] - (q * x).sum(-1)) / exact_t**2
    along_h = (q - np.eye(CLASSES)[labels]) @ np.float64(w) / exact_t

    def gradients(f, sign):
        return [sign * x for x in jax.grad(lambda *a: f(*a).sum(), (0, 1))(t, h)]

    functions = (log_prob, -1), (surprisals, 1), (total, 1)
    run = optimized_jit(lambda: [(sign * f(t, h), gradients(f, sign)) for f, sign in functions])
    for (value, (of_t, of_h)), (f, _) in zip(run(), functions, strict=True):
        np.testing.assert_allclose(value, exact.sum() if f is total else exact, rtol=4e-7)
        np.testing.assert_allclose(of_t, along_t if of_each else along_t.sum(), rtol=2e-6)
        np.testing.assert_allclose(of_h, along_h, rtol=2e-6, atol=1e-7)


def test_a_python_temperature_of_1_costs_nothing(problem):
    labels, h, w, b, *_ = problem
    for function in (jce.linear_log_probs, jce.linear_cross_entropy):

        def text(function=function, **options):
            return jax.jit(lambda *a: function(*a, **options)).lower(labels, h, w, b).as_text()

        assert text(temperature=1.0) == text(temperature=1) == text() != text(temperature=2.0)


@pytest.mark.parametrize("reduction", ["mean", "none", "log-probabilities"])
@pytest.mark.slow
def test_the_temperature_of_a_masked_token_may_be_0(reduction, problem):
    """Every derivative for a masked token is 0. For a kept token, T = 0 means greedy."""
    labels, h, w, b, t = problem
    kept = np.arange(TOKENS) % 2 == 0

    def results(labels, h, w, b, t, z_loss=0.0, **options):
        if reduction == "log-probabilities":
            return jce.linear_log_probs(labels, h, w, b, temperature=t, chunk_size=2, **options)
        return jce.linear_cross_entropy(
            labels,
            h,
            w,
            b,
            temperature=t,
            z_loss=z_loss,
            reduction=reduction,
            chunk_size=2,
            **options,
        )

    def total(*args):
        return sum(x.sum() for x in jax.tree.leaves(results(labels, *args, z_loss=0.1, where=kept)))

    with jax.debug_nans(False):  # debug_nans would raise even if a select drops the NaN
        got, expected = (jax.grad(total, (0, 1, 2, 3))(h, w, b, np.where(kept, t, x)) for x in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert np.isfinite(np.concatenate([x.ravel() for x in got])).all()
    greedy = np.argmax(h @ w.T + b, -1)
    of_greedy, gradient = jax.value_and_grad(
        lambda h: sum(x.sum() for x in jax.tree.leaves(results(greedy, h, w, b, np.zeros(TOKENS)))),
    )(h)
    assert of_greedy == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_derivatives_at_a_temperature_of_0(reduction):
    """If the label isn't the greedy class, the derivatives with respect to both classes' logits are infinite."""
    h, w, t = np.ones((1, 1), np.float32), np.zeros((3, 1), np.float32), np.zeros(1, np.float32)

    def loss(b):
        return jce.linear_cross_entropy(np.zeros(1, int), h, w, b, temperature=t, reduction=reduction).sum()

    value, gradient = jax.value_and_grad(loss)(np.float32([0, 2, 1]))
    assert value == np.inf
    np.testing.assert_array_equal(gradient, [-np.inf, np.inf, 0])


@pytest.mark.holds_nan
@pytest.mark.parametrize("wrong", ["greedy", "no class", "overflow"])
@pytest.mark.in_turn(3)
def test_a_loss_that_is_masked_afterwards_adds_nothing_to_the_heads_gradient(wrong, problem):
    """Such a loss has an infinite or NaN derivative and a cotangent of 0. In a matmul, their product would be NaN."""
    labels, h, w, b, t = problem
    out = np.arange(TOKENS) % 2 == 0
    h, w, b, t = map(np.float32, (h, 4 * w, b, t))
    h = np.where(out[:, None] & (wrong == "overflow"), np.finfo(h.dtype).max * np.sign(w[1]), h)
    labels, t = np.where(out & (wrong == "no class"), 99, labels), np.where(out, np.float32(0), t)

    def loss(some):
        options = {"temperature": t[some]} if wrong == "greedy" else {}

        def total(h, w, b):
            of_each = jce.linear_cross_entropy(labels[some], h, w, b, reduction="none", chunk_size=2, **options)
            return jnp.where(out[some], 0, of_each).sum()

        return jax.grad(total, (0, 1, 2))(h[some], w, b)

    of_hidden, *of_head = loss(np.arange(TOKENS))
    of_kept, *expected = loss(np.flatnonzero(~out))
    np.testing.assert_array_equal(of_hidden[out], 0)
    np.testing.assert_allclose(of_hidden[~out], of_kept, rtol=1e-6)
    for got, wanted in zip(of_head, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_tail_at_a_temperature_of_0():
    """If the list holds the greedy class, all classes in the tail have probability 0, and the loss is infinite.

    A tail whose target is 0 adds 0. If the tail has only forbidden classes, its derivative is 0.
    """
    x, labels = np.float32([[3, 1, 0, -1]]), np.array([[0]])

    def loss(t, p, bias):
        options = {"label_probs": np.float32([[p]]), "tail": True, "temperature": t, "reduction": "sum"}
        return jce.linear_cross_entropy(labels, x, np.eye(4, dtype=np.float32), np.float32(bias), **options)

    def in_both_modes(*others):
        t = np.float32(0)
        value, reverse = jax.value_and_grad(loss)(t, *others)
        return value, reverse, jax.jvp(lambda t: loss(t, *others), (t,), (np.float32(1),))[1]

    free, forbidden = [0] * 4, [0, -np.inf, -np.inf, -np.inf]
    assert in_both_modes(0.6, free) == (np.inf, -np.inf, -np.inf)
    assert in_both_modes(1.0, free) == (0, 0, 0)
    assert in_both_modes(0.6, forbidden) == (np.inf, 0, 0)


def test_a_list_of_temperatures(problem):
    """A list is converted to an array. If it were compiled in as a constant, each list would need a new compilation."""
    labels, h, w, b, t = problem
    t = np.float32(t)
    expected = jce.linear_cross_entropy(labels, h, w, b, temperature=t)
    for temperature in (list(map(float, t)), tuple(map(float, t))):
        assert jce.linear_cross_entropy(labels, h, w, b, temperature=temperature) == expected
    with pytest.raises(ValueError, match=r"z_loss must be a real number.*got z_loss: float(32|64)\[2\]"):
        jce.linear_cross_entropy(labels, h, w, b, z_loss=[0.1, 0.2])


def test_wrong_arguments(problem):
    labels, h, w, b, *_ = problem
    lists = {"labels": labels[:, None], "label_probs": np.ones((TOKENS, 1))}
    for given in ({"labels": labels}, lists):
        for wrong, error, says in (
            (np.ones(3), ValueError, r"temperature must broadcast to the token axes, \(7,\); got temperature: float"),
            (0.0, ValueError, "temperature must be greater than 0"),
            (np.ones(TOKENS, complex), TypeError, "temperature must be real"),
            (np.ones((), complex), TypeError, "temperature must be real"),
        ):
            with pytest.raises(error, match=f"linear_cross_entropy: .*{says}"):
                jce.linear_cross_entropy(hidden=h, head=w, bias=b, temperature=wrong, **given)


@OF_EACH
@pytest.mark.parametrize("of", ["mean", "none", "list"])
@pytest.mark.in_turn(6)
def test_on_a_mesh(of, of_each, rng):
    """Tokens and classes, each split over two devices, give the same as one device, with masked tokens and z-loss."""
    mesh = jax.make_mesh((2, 2), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    h, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, WIDTH), (12, WIDTH)))
    labels, t = rng.integers(0, 12, 8), np.linspace(0.5, 2, 8, dtype=np.float32) if of_each else np.float32(0.7)
    options = {"reduction": "none" if of == "none" else "mean", "z_loss": 0.1, "where": np.arange(8) != 2}
    if of == "list":
        labels, options = labels[:, None], options | {"label_probs": np.full((8, 1), 0.9, np.float32)}

    def run(function):
        def total(h, w, t):
            return jnp.sin(function(labels, h, w, temperature=t, chunk_size=2, **options)).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(h, w, t)

    split = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="tokens", class_axis="classes")
    for x, y in zip(*(jax.tree.leaves(run(f)) for f in (split, jce.linear_cross_entropy)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


# Functions of two rows of logits at one temperature


OF_TWO = (jce.kl_divergence_with_logits, jce.jensen_shannon_divergence_with_logits)
each_of_two = pytest.mark.parametrize("function", OF_TWO, ids=lambda function: function.__name__)


def two_rows(rng, apart, offset, shape=(40, 16)):
    """Nearly equal logits with a common offset, on a grid, so that their differences are exact."""
    x = np.round(1024 * (3 * rng.standard_normal(shape) + offset)) / 1024
    return np.float32(x), np.float32(x + np.round(2**16 * apart * rng.standard_normal(shape)) / 2**16)


def in_double(function, t, x, y):
    """Value and gradient with respect to the logits, in float64, from logits that are divided first."""
    with jax.enable_x64(True):
        x, y = np.float64(x), np.float64(y)

        def total(x, y):
            values = function(x / t, y / t)
            return values.sum(), values

        gradients, values = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, y)
        return values, gradients


@each_of_two
@pytest.mark.parametrize("traced", [False, True], ids=["a number", "traced"])
@pytest.mark.in_turn(4, "wide")
def test_nearly_equal_rows(function, traced, rng):
    """Values and gradients are as accurate as at T = 1. Dividing both rows by T first could lose all digits."""
    t = np.float32(0.7)
    given = t if not traced else jnp.asarray(t)

    @jax.jit
    def at_t(x, y):
        def total(x, y):
            values = function(x, y, temperature=given)
            return values.sum(), values

        return jax.grad(total, (0, 1), has_aux=True)(x, y)

    for apart, offset in ((1, 0), (1e-2, 100), (1e-4, 100)):
        x, y = two_rows(rng, apart, offset)
        exact_values, exact_gradients = in_double(function, np.float64(t), x, y)
        gradients, values = at_t(x, y)
        np.testing.assert_allclose(values, exact_values, rtol=1e-6)
        for got, exact in zip(gradients, exact_gradients, strict=True):
            np.testing.assert_allclose(got, exact, rtol=0, atol=2e-6 * float(np.abs(exact).max()))
        if apart < 1:
            assert np.abs(np.float64(function(x / t, y / t)) / np.float64(exact_values) - 1).max() > 1e-4


def test_how_the_gradient_of_kl_at_nearly_equal_rows_depends_on_the_temperature(rng):
    """Both logits and their difference then have tangents, and tangents that nearly cancel must not be subtracted."""
    t, (x, y) = np.float32(0.7), two_rows(rng, 1e-3, 0)

    @jax.jit
    def along_t(x, y, t):
        def gradients(t):
            return jax.grad(lambda *rows: jce.kl_divergence_with_logits(*rows, temperature=t).sum(), (0, 1))(x, y)

        return jax.jvp(gradients, (t,), (jnp.ones_like(t),))[1]

    found = along_t(x, y, t)
    with jax.enable_x64(True):
        expected = along_t(*map(np.float64, (x, y, t)))
    for got, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@pytest.mark.wide
def test_a_head_equals_its_logits(rng):
    x, y = two_rows(rng, 1e-2, 1)
    eye = np.eye(16, dtype=np.float32)
    for t in (0.7, 2.0, np.float32(1.3)):
        of_heads = jce.linear_kl_divergence(jce.Linear(x, eye), jce.Linear(y, eye), temperature=t, reduction="none")
        np.testing.assert_allclose(jce.kl_divergence_with_logits(x, y, temperature=t), of_heads, rtol=1e-6)


@each_of_two
@pytest.mark.parametrize("mode", ["jvp", *SECOND])
@pytest.mark.in_turn(4)
def test_two_rows_in_every_mode(function, mode, rng):
    """First and second derivatives in both modes, with respect to rows and T, equal those of rows divided by T."""
    with jax.enable_x64(True):
        x, y = (np.float64(z) for z in two_rows(rng, 1, 0, (5,)))
        t, kept = np.float64(1.7), np.arange(5) != 3
        arguments = (x, y, t)

        def at_t(x, y, t):
            return function(x, y, temperature=t, where=kept)

        def divided(x, y, t):
            return function(x / t, y / t, where=kept)

        @jax.jit
        def run(arguments, directions):
            return [modes(f, (0, 1, 2))[mode](arguments, directions) for f in (at_t, divided)]

        got, exact = run(arguments, tuple(np.float64(rng.standard_normal(np.shape(z))) for z in arguments))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@each_of_two
@pytest.mark.holds_nan
@pytest.mark.in_turn(2, "wide")
def test_two_rows_at_the_boundary(function):
    """-∞, NaN and +∞ have the same effect as at T = 1, in the value and in the gradient of each row."""
    inf, nan = np.inf, np.nan
    x = np.float32([[0, 1, -inf], [0, 0, -inf], [nan, 0, 0], [0, inf, 0], [-inf] * 3, [0, 0, 0], [5, 5, 5]])
    y = np.float32([[0, 2, -inf], [0, -inf, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, nan, 0], [5, 5, 5]])

    def derivatives(f, *rows):
        return jax.tree.leaves(jax.jit(jax.vmap(jax.value_and_grad(f, (0, 1))))(*rows))

    for t, traced in ((1.7, False), (2.0, False), (1.7, True)):
        given = jnp.float32(t) if traced else t
        at_t = derivatives(functools.partial(function, temperature=given), x, y)
        divided = derivatives(lambda x, y, t=t: function(x / np.float32(t), y / np.float32(t)), x, y)
        for got, exact in zip(at_t, divided, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-7)


@each_of_two
def test_a_wrong_temperature_of_two_rows(function):
    x = np.zeros((2, 3), np.float32)
    for wrong in (0.0, -1.0, "hot", np.ones(2)):
        with pytest.raises(ValueError, match=rf"{function.__name__}: temperature must be"):
            function(x, x, temperature=wrong)
