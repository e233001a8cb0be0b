"""Tests that apply only to logits and labels: labels outside [0, n), smoothing, and logits split over devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jce
from bench.hlo import collectives
from tests.kernels import each_of_logits, each_with_classes, easy, gradient, logit_rows, total
from tests.optimized_jit import optimized_jit

INF, NAN = np.inf, np.nan


def value_and_gradient(labels, logits, **options):
    def loss(x):
        return jce.cross_entropy_with_integer_labels(labels, x, **options)

    return loss(logits), jax.grad(lambda x: loss(x).sum())(logits)


# Labels


@pytest.mark.holds_nan
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("wrong", [-1, -4, 4, 2**31 - 1, -(2**31)])
@pytest.mark.in_turn(8)
def test_a_label_outside_the_classes_makes_only_its_row_nan(wrong, smoothing, rng):
    logits = rng.standard_normal((3, 4)).astype(np.float32)
    labels = np.array([1, wrong, 3])
    value, g = value_and_gradient(labels, logits, label_smoothing=smoothing)
    expected, expected_g = value_and_gradient(labels % 4, logits, label_smoothing=smoothing)
    assert np.isnan(value[1])
    assert np.isnan(g[1]).all()
    np.testing.assert_array_equal(value[::2], expected[::2])
    np.testing.assert_array_equal(g[::2], expected_g[::2])
    _, tangent = jax.jvp(lambda x: value_and_gradient(labels, x, label_smoothing=smoothing)[1], (logits,), (logits,))
    assert not np.isnan(tangent[::2]).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.in_turn(3)
def test_a_masked_row_may_hold_any_label_and_any_logit(smoothing, rng):
    logits = rng.standard_normal((3, 4)).astype(np.float32)
    logits[1] = [NAN, INF, -INF, 0]
    kept = np.array([True, False, True])
    value, g = value_and_gradient(np.array([1, -100, 3]), logits, where=kept[:, None], label_smoothing=smoothing)
    expected, expected_g = value_and_gradient(np.array([1, 3]), logits[::2], label_smoothing=smoothing)
    np.testing.assert_array_equal(value, [expected[0], 0, expected[1]])
    np.testing.assert_array_equal(g, [expected_g[0], np.zeros(4), expected_g[1]])


def test_the_loss_is_infinite_if_the_labels_class_is_masked():
    logits, where = np.zeros(3, np.float32), np.array([True, False, True])
    value, g = value_and_gradient(1, logits, where=where)
    assert value == INF
    np.testing.assert_array_equal(g, [0.5, 0, 0.5])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
@pytest.mark.slow
def test_label_dtypes(dtype, rng):
    logits = rng.standard_normal((5, 200)).astype(np.float32)
    labels = np.array([0, 1, 77, 100, 127])
    expected, expected_g = value_and_gradient(labels, logits)
    value, g = value_and_gradient(labels.astype(dtype), logits)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(g, expected_g)


@pytest.mark.slow
def test_labels_along_any_axis(rng):
    logits = rng.standard_normal((3, 4, 5)).astype(np.float32)
    for axis in range(-3, 3):
        labels = rng.integers(logits.shape[axis], size=np.delete(logits.shape, axis))
        moved = np.moveaxis(logits, axis, -1)
        for options in ({}, {"label_smoothing": 0.1}):
            value, g = value_and_gradient(labels, logits, axis=axis, **options)
            expected, expected_g = value_and_gradient(labels, moved, **options)
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_allclose(np.moveaxis(g, axis, -1), expected_g, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_labels_equal_one_hot_targets(rng):
    for name, logits in logit_rows(rng, (50, 7), np.float32).items():
        labels = rng.integers(7, size=50)
        one_hot = np.eye(7, dtype=np.float32)[labels]
        value, g = value_and_gradient(labels, logits)
        np.testing.assert_allclose(jce.cross_entropy_with_logits(one_hot, logits), value, rtol=1e-6, err_msg=name)
        soft = jax.grad(lambda x, p=one_hot: jce.cross_entropy_with_logits(p, x).sum())(logits)
        np.testing.assert_allclose(soft, g, rtol=4e-6, atol=1e-37, err_msg=name)


@pytest.mark.parametrize("n", [4, 10, 1000])
@pytest.mark.in_turn(3)
def test_rounding_of_labels_and_one_hot_targets(n, rng):
    """On a CPU, most rows are equal bit for bit, and others are about an ulp apart, as the docstring says."""
    x, labels = 3 * rng.standard_normal((2000, n)).astype(np.float32), rng.integers(0, n, 2000)
    soft = jce.cross_entropy_with_logits(np.eye(n, dtype=np.float32)[labels], x)
    value = np.asarray(jce.cross_entropy_with_integer_labels(labels, x))
    apart = np.abs(value - soft) / np.spacing(value)
    assert 0 < (apart > 0).mean() < 0.45
    assert (apart > 1).mean() < 0.06
    assert apart.max() <= 5


def test_minus_infinity_beside_the_lowest_numbers():
    """The divergence and its derivatives are 0.

    In other rows, -∞ is replaced by a number far below the row's maximum. In this row that isn't possible, since the
    maximum is near the lowest finite number.
    """
    x, y = np.float32([-3.3e38, -np.inf]), np.float32([-3.3e38, -3.4e38])
    value, gradients = jax.value_and_grad(jce.kl_divergence_with_logits, (0, 1))(x, y)
    assert value == 0
    np.testing.assert_array_equal(gradients, np.zeros((2, 2)))


def test_derivatives_with_respect_to_smoothing(rng):
    """The derivative is 1/n Σ log 1/qᵢ - log 1/q_y, and its derivative with respect to the logits is [i = y] - 1/n.

    Under `where`, n counts the kept classes.
    """
    logits, labels = np.float32(rng.standard_normal((5, 6))), np.array([0, 1, 2, 3, 0])
    kept = np.arange(6) < 4
    for options, n in (({}, 6), ({"where": kept}, 4)):

        def loss(epsilon, x, options=options):
            return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=epsilon, **options).sum()

        surprisals = -jax.nn.log_softmax(jnp.where(np.arange(6) < n, logits, -INF))[:, :n]
        expected = (surprisals.mean(-1) - surprisals[np.arange(5), labels]).sum()
        mixed = np.where(np.arange(6) < n, np.eye(6)[labels] - 1 / n, 0)
        slope, of_logits = jax.jit(jax.value_and_grad(jax.grad(loss), 1))(0.1, logits)
        np.testing.assert_allclose(slope, expected, rtol=1e-5)
        np.testing.assert_allclose(of_logits, mixed, atol=1e-6)
        np.testing.assert_allclose(jax.jacfwd(jax.grad(loss, 1))(0.1, logits), mixed, atol=1e-6)


@pytest.mark.slow
def test_smoothing_is_a_mixture_of_targets(rng):
    """The target is (1-ε) one-hot + ε/n, where n counts the kept classes. At ε = 1 the label has no effect."""
    logits = 3 * rng.standard_normal((50, 7)).astype(np.float32)
    labels, where = rng.integers(5, size=50), np.arange(7) < 5
    for epsilon in (0.0, 0.1, 0.5, 1.0):
        for options, n in (({}, 7), ({"where": where}, 5)):
            target = np.float32((1 - epsilon) * np.eye(7)[labels] + epsilon / n * (np.arange(7) < n))
            value, g = value_and_gradient(labels, logits, label_smoothing=epsilon, **options)
            np.testing.assert_allclose(value, jce.cross_entropy_with_logits(target, logits, **options), rtol=2e-6)
            soft = jax.grad(lambda x, p=target, o=options: jce.cross_entropy_with_logits(p, x, **o).sum())(logits)
            np.testing.assert_allclose(g, soft, atol=4e-7)
    np.testing.assert_array_equal(
        jce.cross_entropy_with_integer_labels(0, np.float32([-INF, 0, 0]), label_smoothing=1.0), INF
    )


# Identities


def test_shift_invariance(rng):
    x, y = (rng.integers(-8, 8, (50, 7)).astype(np.float32) for _ in range(2))
    p = np.float32(rng.dirichlet(np.ones(7), 50))
    for shift in (1024.0, -65536.0):
        z = x + np.float32(shift)  # exactly
        for a, b in (
            (jce.entropy_with_logits(x), jce.entropy_with_logits(z)),
            (jce.cross_entropy_with_logits(p, x), jce.cross_entropy_with_logits(p, z)),
            (jce.kl_divergence_with_logits(x, y), jce.kl_divergence_with_logits(z, y)),
            (jce.kl_divergence_with_logits(y, x), jce.kl_divergence_with_logits(y, z)),
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_logits_equal_probabilities_of_the_softmax(rng):
    x, y = (rng.standard_normal((50, 7)).astype(np.float32) for _ in range(2))
    p, q = jax.nn.softmax(x), jax.nn.softmax(y)
    close = {"rtol": 4e-6, "atol": 1e-6}
    np.testing.assert_allclose(jce.entropy_with_logits(x), jce.entropy(p), **close)
    np.testing.assert_allclose(jce.cross_entropy_with_logits(p, y), jce.cross_entropy(p, q), **close)
    np.testing.assert_allclose(jce.kl_divergence_with_logits(x, y), jce.kl_divergence(p, q), **close)
    np.testing.assert_allclose(
        jce.kl_divergence_with_logits(x, y),
        jce.cross_entropy_with_logits(p, y) - jce.entropy_with_logits(x),
        **close,
    )


@pytest.mark.slow
def test_binary_logits_equal_two_classes(rng):
    x, y = (5 * rng.standard_normal(100).astype(np.float32) for _ in range(2))
    two = [np.stack([z, np.zeros_like(z)], -1) for z in (x, y)]
    alpha = rng.random(100).astype(np.float32)
    np.testing.assert_allclose(jce.binary_entropy_with_logits(x), jce.entropy_with_logits(two[0]), rtol=2e-6)
    np.testing.assert_allclose(
        jce.binary_kl_divergence_with_logits(x, y), jce.kl_divergence_with_logits(*two), rtol=4e-6
    )
    np.testing.assert_allclose(
        jce.binary_cross_entropy_with_logits(alpha, x),
        jce.cross_entropy_with_logits(np.stack([alpha, 1 - alpha], -1), two[0]),
        rtol=2e-6,
    )


def test_kl_is_zero_only_at_equality_up_to_a_shift(rng):
    x = rng.standard_normal((1000, 7)).astype(np.float32)
    x = np.round(x * 2**10) / 2**10  # shifted without rounding
    for shift in (0, 1, -64):
        np.testing.assert_array_equal(jce.kl_divergence_with_logits(x, x + np.float32(shift)), np.zeros(1000))
    y = x.copy()
    y[:, 3] = np.nextafter(y[:, 3], np.float32(9))
    assert (jce.kl_divergence_with_logits(x, y) > 0).all()
    np.testing.assert_array_equal(jce.binary_kl_divergence_with_logits(x, x), np.zeros_like(x))
    assert (jce.binary_kl_divergence_with_logits(x, y)[:, 3] > 0).all()


def test_divergence_at_a_probability_of_1e_87():
    """In float64, where this isn't near subnormal: KL = (log p/q - 1) p + q, for p and q of the second class."""
    x, y = np.array([0.0, -200.0]), np.array([0.0, -300.0])
    p, q = math.exp(-200), math.exp(-300)
    with jax.enable_x64(True):
        value, (dx, dy) = jax.value_and_grad(jce.kl_divergence_with_logits, (0, 1))(x, y)
    np.testing.assert_allclose(value, 99 * p + q, rtol=1e-13)
    np.testing.assert_allclose(dx, [-100 * p, 100 * p], rtol=1e-13)
    np.testing.assert_allclose(dy, [p - q, q - p], rtol=1e-13)


def test_the_gradient_of_kl_at_many_very_low_logits():
    """pᵢ (log pᵢ/qᵢ - KL) is finite, although a weighted sum of log pᵢ/qᵢ over the classes would overflow."""
    low = np.arange(256) < 128
    gradient = jax.grad(jce.kl_divergence_with_logits)(jnp.zeros(256), jnp.where(low, -3e38, 0.0))
    np.testing.assert_allclose(gradient, np.where(low, 1.5e38, -1.5e38) / 256, rtol=1e-5)


@pytest.mark.slow
def test_gradients_at_nearly_equal_logits(rng):
    """For logits 1e-4 apart, q - p as a difference of two rounded numbers would have only three correct digits."""
    x = rng.standard_normal((50, 7)).astype(np.float32)
    y = x + np.float32(1e-4) * rng.standard_normal(x.shape).astype(np.float32)
    for function in (jce.kl_divergence_with_logits, jce.binary_kl_divergence_with_logits):
        gradients = jax.grad(lambda x, y, f=function: f(x, y).sum(), (0, 1))
        single = gradients(x, y)
        with jax.enable_x64(True):
            double = gradients(x.astype(np.float64), y.astype(np.float64))
        for a, b in zip(single, map(np.asarray, double), strict=True):
            scale = np.abs(b).max(-1, keepdims=True)
            assert (np.abs(np.asarray(a) - b) < 4e-6 * scale).all()


# Sharded logits


@pytest.mark.needs_jit
@each_of_logits
@pytest.mark.parametrize("axes", [("rows", None), (None, "classes"), ("rows", "classes")])
@pytest.mark.one_for_each("kernel")
@pytest.mark.in_turn(3, "wide")
def test_sharded_logits_are_not_gathered(kernel, axes, rng):
    """Value and gradient send a few numbers per row between devices. No collective is as large as a row's classes."""
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    rows, n = 8, 512
    arguments = easy(kernel, rng, (rows, n))
    positions = tuple(range(len(arguments)))
    function = jax.jit(jax.value_and_grad(total(kernel), positions), in_shardings=(sharding,) * len(arguments))
    value, g = function(*arguments)
    expected, of_one_device = jax.jit(jax.value_and_grad(total(kernel), positions))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=4e-6)
    for a, b in zip(g, of_one_device, strict=True):
        np.testing.assert_allclose(a, b, rtol=4e-6, atol=1e-7)
    for collective in collectives(function.lower(*arguments).compile().as_text()):
        assert collective.size <= 8 * rows


# Cost


@pytest.mark.needs_jit
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA fused less into its reductions")
@pytest.mark.parametrize("shape", [(8192, 1000), (65536, 10), (2048, 32000), (8192, 50257)])
@pytest.mark.parametrize(
    "function", [jce.cross_entropy_with_logits, jce.cross_entropy_with_integer_labels], ids=lambda f: f.__name__
)
@pytest.mark.slow
def test_no_temporary_of_the_logits_size(function, shape):
    """On a CPU, value and gradient only read arguments and write the gradient. optax stores two more such arrays."""
    logits = jax.ShapeDtypeStruct(shape, np.float32)
    is_soft = function is jce.cross_entropy_with_logits
    target = logits if is_soft else jax.ShapeDtypeStruct(shape[:1], np.int32)
    for program in (function, jax.value_and_grad(lambda p, x: function(p, x).mean(), 1)):
        temporaries = optimized_jit(program).lower(target, logits).compile().memory_analysis().temp_size_in_bytes
        assert temporaries <= 4 * (64 * shape[0] + shape[1])  # a few numbers per row, and one per class


@pytest.mark.needs_jit
@each_with_classes
@pytest.mark.in_turn(5, "wide")
def test_no_array_of_classes_times_classes(kernel):
    arguments = [jax.ShapeDtypeStruct((3000,), np.float32)] * len(kernel.arguments)
    program = gradient(kernel).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3000 * 100


@pytest.mark.slow
def test_more_classes_than_float32_can_count():
    """Above 2²⁴ classes, distances from the label are computed in integers: float32 can't represent every index."""
    n = 2**24 + 8
    logits = jnp.zeros(n).at[n - 1].set(40.0)
    loss = jce.cross_entropy_with_integer_labels(n - 2, logits)
    np.testing.assert_allclose(loss, 40.0, rtol=1e-6)


def test_a_hessian_vector_product_at_equal_logits(rng):
    """The reference is the mean over a thousand maximal classes. With their sum, three more digits would be lost."""
    t = (1 + 1e-3 * rng.standard_normal(1000)).astype(np.float32)
    gradient = jax.grad(lambda x: jce.cross_entropy_with_integer_labels(0, x))
    _, hvp = jax.jvp(gradient, (np.zeros(1000, np.float32),), (t,))
    exact = (t.astype(np.float64) - t.mean(dtype=np.float64)) / 1000
    np.testing.assert_allclose(hvp, exact, atol=3e-4 * np.abs(exact).max())


@pytest.mark.slow
def test_the_mixed_derivative_of_soft_targets_at_a_nearly_certain_class():
    """∂²H/∂p₀∂x₀ is q₀ - 1 = -4e-9. Computed as a difference from 1, it would have no correct digit."""
    p, x = jnp.array([1.0, 0.0, 0.0]), jnp.array([20.0, 0.0, 0.0])
    gradient = jax.grad(jce.cross_entropy_with_logits, 1)
    mixed = jax.jvp(lambda p: gradient(p, x), (p,), (jnp.array([1.0, 0.0, 0.0]),))[1]
    np.testing.assert_allclose(mixed, [-4.1223072e-9, 2.0611536e-9, 2.0611536e-9], rtol=1e-6)


@pytest.mark.parametrize("margin", [6, 12, 16])
@pytest.mark.slow
def test_derivatives_are_accurate_if_a_class_dominates(margin, rng):
    """First and second derivatives are compared with float64 if 1 - q is about e^-margin, also for one-hot targets."""
    x, y, t, u = 0.5 * rng.standard_normal((4, 6, 8))
    x[:, 3] += margin
    y[:, 3] += margin
    sure, labels = np.eye(8)[np.full(6, 3)], np.full(6, 3)

    def losses(ce_of_soft, ce_of_labels, entropy, kl, jsd):
        return {
            "soft": lambda x, y: ce_of_soft(jnp.asarray(sure, x.dtype), x),
            "labels": lambda x, y: ce_of_labels(labels, x),
            "entropy": lambda x, y: entropy(x),
            "divergence": kl,
            "Jensen-Shannon": jsd,
        }

    def log_q(x):
        return jax.nn.log_softmax(x)

    def mixture(x, y):
        p, q = jnp.exp(log_q(x)), jnp.exp(log_q(y))
        m = jnp.log((p + q) / 2)
        return (p * (log_q(x) - m) + q * (log_q(y) - m)).sum(-1) / 2

    plain = losses(
        lambda p, x: -(p * log_q(x)).sum(-1),
        lambda y, x: -log_q(x)[:, 3],
        lambda x: -(jnp.exp(log_q(x)) * log_q(x)).sum(-1),
        lambda x, y: (jnp.exp(log_q(x)) * (log_q(x) - log_q(y))).sum(-1),
        mixture,
    )
    ours = losses(
        jce.cross_entropy_with_logits,
        jce.cross_entropy_with_integer_labels,
        jce.entropy_with_logits,
        jce.kl_divergence_with_logits,
        jce.jensen_shannon_divergence_with_logits,
    )

    def derivatives(functions):
        def run(x, y, t, u):
            def gradients(f):
                return lambda x, y: jax.grad(lambda x, y: f(x, y).sum(), (0, 1))(x, y)

            return {
                name: (gradients(f)(x, y), jax.jvp(gradients(f), (x, y), (t, u))[1]) for name, f in functions.items()
            }

        return optimized_jit(run)

    single = [z.astype(np.float32) for z in (x, y, t, u)]
    got = derivatives(ours)(*single)
    with jax.enable_x64(True):
        exact = derivatives(plain)(*(z.astype(np.float64) for z in single))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * np.abs(b).max())
