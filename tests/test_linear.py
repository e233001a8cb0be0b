"""Fused heads: every option against dense float64 logits, accuracy, edge cases, transformations, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs

import jce
from jce._heads.loop.chunk_rule import RULES
from jce._jax import platforms as _platforms
from tests import dense_head
from tests.optimized_jit import optimized_jit
from tests.oracle import spacing

INF, NAN = np.inf, np.nan
N, D, CLASSES = 11, 5, 13


# Every option, against dense logits

CHOICES = {
    "target": ["a label", "labels", "labels and a tail"],
    "bias": ["none", "finite", "forbidding"],
    "weights": ["none", "some 0"],
    "where": ["none", "some"],
    "reduction": ["mean", "sum", "none"],
    "label_smoothing": [0.0, 0.1, 1.0],
    "z_loss": [0.0, 0.01],
    "logit_soft_cap": [None, 3.0],
    "temperature": ["1", "one for all", "one for each"],
    "chunk_size": [None, 1, 4, 11, 50],
    "numbers": ["Python's", "traced"],
    "platform": ["CPU", "TPU", "GPU"],
}


def possible(values) -> bool:
    chosen = dict(zip(CHOICES, values, strict=False))
    # The loss is then infinite, or its derivative with respect to the smoothing ε
    infinite = chosen.get("label_smoothing") or chosen.get("numbers") == "traced"
    return not (chosen.get("bias") == "forbidding" and infinite)


PAIRWISE = [dict(zip(CHOICES, row, strict=True)) for row in AllPairs(list(CHOICES.values()), filter_func=possible)]


def chosen_arguments(options, rng):
    """The labels, the differentiated arguments and the static options that the choices stand for."""
    target, bias, weights, where, temperature, numbers = (
        options.pop(name) for name in ("target", "bias", "weights", "where", "temperature", "numbers")
    )
    arguments = {"hidden": rng.standard_normal((N, D)), "head": rng.standard_normal((CLASSES, D))}
    if bias != "none":
        arguments["bias"] = np.append(rng.standard_normal(CLASSES - 1), -INF if bias == "forbidding" else 0.5)
    labels = rng.permuted(np.tile(np.arange(CLASSES - 1), (N, 1)), axis=1)[:, :3]  # distinct
    if target == "a label":
        labels = labels[:, 0]
    else:
        options["tail"] = target == "labels and a tail"
        arguments["label_probs"] = rng.uniform(0.1, 0.3, labels.shape)
    if weights == "some 0":
        arguments["weights"] = rng.uniform(0.5, 2, N) * (np.arange(N) % 4 > 0)
    if where == "some":
        options["where"] = np.arange(N) % 3 > 0
    if temperature == "one for each":
        arguments["temperature"] = rng.uniform(0.5, 2, N)
    elif temperature == "one for all":
        options["temperature"] = 0.7
    if numbers == "traced":
        of_all = ("label_smoothing", "z_loss", "logit_soft_cap", "temperature")
        names = [name for name in of_all if options.get(name) is not None]
        arguments |= {name: np.array(options.pop(name)) for name in names}
    return labels, arguments, options


@pytest.mark.parametrize("options", PAIRWISE, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.in_turn(12)
def test_every_pair_of_options(options, rng, monkeypatch):
    """Value, gradient and Hessian-vector product with respect to each argument, in float64, as on each platform."""
    options = dict(options)
    platform = getattr(_platforms, options.pop("platform"))
    monkeypatch.setattr(_platforms, "CPU", platform)
    monkeypatch.setitem(RULES, platform.name, RULES[platform.name]._replace(chunk_bytes=0, least_tokens=4))
    jax.clear_caches()
    chunk_size = options.pop("chunk_size")
    labels, arguments, options = chosen_arguments(options, rng)
    directions = {name: np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for name, x in arguments.items()}
    cotangent = rng.standard_normal(N)

    def results(function, **more):
        def scalar(a):
            value = function(labels, **a, **options, **more)
            return jnp.vdot(cotangent, value) if options["reduction"] == "none" else value

        value, gradient = jax.value_and_grad(scalar)(arguments)
        return value, gradient, jax.jvp(jax.grad(scalar), (arguments,), (directions,))[1]

    with jax.enable_x64(True):
        got = jax.jit(lambda: results(jce.linear_cross_entropy, chunk_size=chunk_size))()
        expected = jax.jit(lambda: results(dense_head.reduced))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, np.nan_to_num(b), rtol=1e-10, atol=1e-12)
    jax.clear_caches()


@pytest.mark.parametrize(
    "options",
    [{"temperature": np.linspace(0.5, 2, N)}, {"label_smoothing": 0.1, "logit_soft_cap": 2.0}],
    ids=["a temperature for each token", "smoothing under a soft cap"],
)
def test_options_that_need_two_passes_on_an_accelerator(options, rng, monkeypatch):
    """Value and gradient in float64, summed as on a TPU, with options whose logits can't be reduced in one pass."""
    monkeypatch.setattr(_platforms, "CPU", _platforms.TPU)
    labels, h, w = rng.integers(0, CLASSES, N), rng.standard_normal((N, D)), rng.standard_normal((CLASSES, D))
    jax.clear_caches()
    with jax.enable_x64(True):
        losses = [functools.partial(f, labels, **options) for f in (jce.linear_cross_entropy, dense_head.reduced)]
        got, expected = jax.jit(lambda h, w: [jax.value_and_grad(f, (0, 1))(h, w) for f in losses])(h, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    jax.clear_caches()


# Accuracy


def confident(rng, tokens=24, n=13, dtype=np.float32):
    """Labels and random logits. A number from -20 to 80 is added to the logit of each label."""
    x = rng.standard_normal((tokens, n))
    labels = rng.integers(0, n, tokens)
    x[np.arange(tokens), labels] += np.linspace(-20, 80, tokens)
    return labels, x.astype(dtype)


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.slow
def test_identity_as_head_against_dense_loss(chunk_size, smoothing, rng):
    """With the identity as head, value and gradient equal those of the dense loss to a few ulps, for any chunk size."""
    labels, x = confident(rng)
    eye = np.eye(x.shape[1], dtype=np.float32)

    def linear(x):
        return jce.linear_cross_entropy(
            labels, x, eye, reduction="none", label_smoothing=smoothing, chunk_size=chunk_size
        )

    def linear_sum(x):
        return jce.linear_cross_entropy(
            labels, x, eye, reduction="sum", label_smoothing=smoothing, chunk_size=chunk_size
        )

    def plain(x):
        return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=smoothing)

    np.testing.assert_allclose(linear(x), plain(x), rtol=3e-7, atol=0)
    for i in range(len(x)):  # each token alone, with the derivative rule for sums
        value, _ = jax.value_and_grad(
            lambda row, y: jce.linear_cross_entropy(y, row, eye, label_smoothing=smoothing, chunk_size=chunk_size)
        )(x[i], labels[i])
        # This rule computes x - max x, which rounds. On a CPU, `plain` often subtracts 0 instead (`known_label.py`).
        np.testing.assert_allclose(value, plain(x)[i], rtol=6e-7, atol=0)
    expected = jax.grad(lambda x: plain(x).sum())(x)
    for g in (jax.grad(lambda x: linear(x).sum())(x), jax.grad(linear_sum)(x)):
        np.testing.assert_allclose(g, expected, rtol=3e-6, atol=1e-7 * smoothing)


@pytest.mark.slow
def test_confident_tokens_stay_accurate(rng):
    """With a rotation as head, relative errors are those of rounding x (some ulps of |h| |W|), even for tiny losses."""
    labels, x = confident(rng, n=16)
    rotation = np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)
    hidden = (x @ rotation).astype(np.float32)

    def loss(hidden, head):
        return jce.linear_cross_entropy(labels, hidden, head, reduction="none")

    with jax.enable_x64(True):
        h, w = hidden.astype(np.float64), rotation.astype(np.float64)
        exact = np.asarray(jce.cross_entropy_with_integer_labels(labels, h @ w.T))
        assert np.min(exact) < 1e-30
        easy = exact > 1e-9
        np.testing.assert_allclose(exact[easy], dense_head.losses(labels, h, w)[easy], rtol=1e-6)
        exact_gradient = np.asarray(jax.grad(lambda h: jce.cross_entropy_with_integer_labels(labels, h @ w.T).sum())(h))
    rounding = 4 * np.finfo(np.float32).eps * (np.abs(hidden) @ np.abs(rotation).T).max(-1)
    assert (np.abs(np.asarray(loss(hidden, rotation), np.float64) - exact) <= rounding * exact).all()
    g = jax.grad(lambda h: loss(h, rotation).sum())(hidden)
    scale = np.abs(exact_gradient).max(-1)
    assert (np.abs(np.asarray(g, np.float64) - exact_gradient).max(-1) <= 2 * rounding * scale).all()


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_half_precision(dtypes, reduction, rng):
    """The loss is as accurate as in float32. Gradients are rounded once, even for a sum over 128 chunks."""
    tokens, d, n = 256, 16, 32
    labels = np.full(tokens, 3)
    h = jnp.asarray(rng.standard_normal((tokens, d)) + 1, dtypes[0])
    w = jnp.asarray(rng.standard_normal((n, d)), dtypes[1])

    def loss(h, w):
        return jce.linear_cross_entropy(labels, h, w, reduction=reduction, chunk_size=2).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, w)
    assert value.dtype == np.float32
    assert [g.dtype for g in gradients] == [h.dtype, w.dtype]
    with jax.enable_x64(True):
        exact, exact_gradients = jax.value_and_grad(loss, (0, 1))(h.astype(np.float64), w.astype(np.float64))
        exact_gradients = [np.asarray(e) for e in exact_gradients]
    np.testing.assert_allclose(value, exact, rtol=2e-6)
    for g, e in zip(gradients, exact_gradients, strict=True):
        scale = np.abs(e).mean()  # smaller entries have the rounding error of a float32 sum whose terms cancel
        error = np.abs(np.asarray(g, np.float64) - e)
        assert (error <= 0.51 * spacing(e, g.dtype) + 4e-6 * scale).all()


def test_same_bits_each_time(rng):
    labels, x = confident(rng)
    head = rng.standard_normal((40, x.shape[1])).astype(np.float32)
    program = optimized_jit(
        jax.value_and_grad(lambda h, w: jce.linear_cross_entropy(labels, h, w, chunk_size=5), (0, 1))
    )
    for a, b in zip(jax.tree.leaves(program(x, head)), jax.tree.leaves(program(x, head)), strict=True):
        np.testing.assert_array_equal(a, b)


# Incomplete chunks and edge cases


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 7, 130])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.in_turn(24)
def test_padding_does_not_change_results(tokens, n, reduction):
    """If all logits are 0, each loss is log n and each q is 1/n. Unmasked padding would change the results."""
    h, w, b = np.zeros((tokens, 2), np.float32), np.zeros((n, 2), np.float32), np.zeros(n, np.float32)
    labels = np.zeros(tokens, np.int32)

    def loss(h, w, b):
        return jce.linear_cross_entropy(labels, h, w, b, reduction=reduction, chunk_size=3, z_loss=0.5).sum()

    value, (dh, dw, db) = jax.value_and_grad(loss, (0, 1, 2))(h, w, b)
    one = math.log(max(n, 1)) + 0.5 * math.log(max(n, 1)) ** 2
    total = tokens if reduction == "none" else min(tokens, 1)
    np.testing.assert_allclose(value, total * one, rtol=1e-6)
    expected = np.full(n, (1 + math.log(max(n, 1))) / max(n, 1)) - (np.arange(n) == 0)
    np.testing.assert_allclose(db, total * expected, rtol=1e-6, atol=1e-6)
    for g, x in ((dh, h), (dw, w)):
        np.testing.assert_array_equal(g, np.zeros_like(x))


@pytest.fixture
def problem(rng):
    labels = rng.integers(0, 6, (2, 4))
    h, w, b = rng.standard_normal((2, 4, 3)), rng.standard_normal((6, 3)), rng.standard_normal(6)
    return labels, *(x.astype(np.float32) for x in (h, w, b))


def value_and_gradients(labels, h, w, b, **options):
    def loss(h, w, b):
        return jce.linear_cross_entropy(labels, h, w, b, chunk_size=3, **options).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(h, w, b)


def close(a, b, rtol=2e-6, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["where", "weight 0"])
@pytest.mark.slow
def test_a_masked_token_may_hold_anything(problem, reduction, how):
    labels, h, w, b = problem
    kept = np.array([[True, False, True, True], [False, True, True, True]])
    ours = {"where": kept} if how == "where" else {"weights": kept.astype(np.float32)}
    expected = value_and_gradients(labels[kept], h[kept], w, b, reduction=reduction)
    labels, h = np.where(kept, labels, -100), np.where(kept[..., None], h, NAN)
    value, (dh, dw, db) = value_and_gradients(labels, h, w, b, reduction=reduction, **ours)
    close((value, (dh[kept], dw, db)), expected)
    np.testing.assert_array_equal(dh[~kept], 0)


def test_a_zero_weight_token_with_a_nan_or_an_invalid_label_is_masked(problem):
    """Zero-weight tokens have a NaN or ∞ in one entry of the hidden state, or a label just beyond the last class."""
    labels, h, w, b = problem
    weights = np.ones(labels.shape, np.float32)
    weights[0, :3] = 0
    expected = value_and_gradients(labels, h, w, b, weights=weights, reduction="sum")
    labels, h = labels.copy(), h.copy()
    h[0, 0, 1], h[0, 1, 2], labels[0, 2] = NAN, INF, 6
    close(value_and_gradients(labels, h, w, b, weights=weights, reduction="sum"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.in_turn(3)
def test_an_infinite_loss_that_is_masked_adds_nothing(problem, reduction):
    """The masked tokens have the label 0, which is a forbidden class. jce itself replaces masked labels by 0."""
    labels, h, w, b = problem
    labels, kept = np.maximum(labels, 1), np.arange(8).reshape(2, 4) > 1
    b[0], labels[0, :2] = -INF, 0
    expected = value_and_gradients(labels[kept], h[kept], w, b, reduction=reduction)
    for options in ({"where": kept}, {"weights": kept.astype(np.float32)}):
        value, (dh, dw, db) = value_and_gradients(labels, h, w, b, reduction=reduction, **options)
        close((value, (dh[kept], dw, db)), expected)
        close(jce.linear_cross_entropy(labels, h, w, b, reduction=reduction, **options).sum(), expected[0])

    def total(weights):
        return jce.linear_cross_entropy(labels, h, w, b, weights=weights, reduction=reduction).sum()

    weights = kept.astype(np.float32)
    g, forward = jax.grad(total)(weights), jax.jacfwd(total)(weights)
    assert np.isfinite(forward[kept]).all()
    close(g[kept], forward[kept])
    policy = jce.linear_log_probs(labels, h, w, b, where=kept)
    np.testing.assert_array_equal(policy.log_prob[~kept], 0)


def test_mean_does_not_depend_on_the_scale_or_sign_of_weights(problem):
    labels, h, w, b = problem
    a = np.linspace(0.5, 2, 8, dtype=np.float32).reshape(2, 4)
    expected = value_and_gradients(labels, h, w, b, weights=a)
    for factor in (1e-3, 100, -1):
        close(value_and_gradients(labels, h, w, b, weights=np.float32(factor) * a), expected)
    zero = np.zeros_like(a)
    np.testing.assert_array_equal(jax.grad(lambda a: jce.linear_cross_entropy(labels, h, w, b, weights=a))(zero), zero)


@pytest.mark.holds_nan
def test_label_smoothing_of_1_still_needs_a_valid_label(problem):
    labels, h, w, b = problem
    b[0], labels[0, 0] = -INF, 0
    value, _ = value_and_gradients(labels, h, w, b, label_smoothing=1.0, reduction="sum")
    assert value == INF
    labels[0, 0], b[0] = -1, 0
    for reduction in ("sum", "none"):
        losses = jce.linear_cross_entropy(labels, h, w, b, label_smoothing=1.0, reduction=reduction)
        assert np.isnan(losses).sum() == 1
        value, _ = value_and_gradients(labels, h, w, b, label_smoothing=1.0, reduction=reduction)
        assert np.isnan(value)


def test_no_classes_with_nonfinite_hidden_states():
    h, w = np.float32([[NAN], [INF]]), np.zeros((0, 1), np.float32)
    assert jce.linear_cross_entropy(np.array([0, 1]), h, w) == 0
    np.testing.assert_array_equal(np.stack(jce.linear_log_probs(np.array([0, 1]), h, w)), np.zeros((2, 2)))


@pytest.mark.holds_nan
@pytest.mark.slow
def test_dtypes_of_labels_and_weights(problem):
    labels, h, w, b = problem
    expected = jce.linear_cross_entropy(labels, h, w, b, weights=np.float32(labels > 2), reduction="sum")
    for weights in (labels > 2, (labels > 2).astype(np.int32), (labels > 2).astype("bfloat16")):
        for y in (labels.astype(np.uint8), labels.astype(np.int16), labels.astype(np.uint32)):
            close(jce.linear_cross_entropy(y, h, w, b, weights=weights, reduction="sum"), expected)
    many = np.zeros((300, 3), np.float32)
    close(jce.linear_cross_entropy(np.uint8([255, 1]), h[0, :2], many), math.log(300))
    with jax.enable_x64(True):
        assert jce.linear_cross_entropy(labels, h, w.astype(np.float64)).dtype == np.float64
        assert np.isnan(jce.linear_cross_entropy(np.int64([2**32]), h[0, :1], w))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_weights_make_the_loss_float64(problem, reduction):
    labels, h, w, _ = problem
    with jax.enable_x64(True):
        assert jce.linear_cross_entropy(labels, h, w, weights=np.ones(labels.shape), reduction=reduction).dtype == float


def test_z_loss_of_a_logit_whose_exponential_overflows(problem):
    loss = jce.linear_cross_entropy(0, np.float32([100, 0]), np.eye(2, dtype=np.float32), z_loss=0.1, reduction="none")
    np.testing.assert_allclose(loss, 1000, rtol=1e-6)


@pytest.mark.slow
def test_hessian_vector_products_of_confident_tokens(rng):
    """The Hessian-vector products of the fused sum and of the dense loss agree, so no larger terms cancel."""
    labels, x = confident(rng)
    eye, t = np.eye(x.shape[1], dtype=np.float32), rng.standard_normal(x.shape).astype(np.float32)

    def hvp(loss):
        return jax.jvp(jax.grad(lambda x: loss(x).sum()), (x,), (t,))[1]

    got = hvp(lambda x: jce.linear_cross_entropy(labels, x, eye, reduction="sum", chunk_size=7))
    np.testing.assert_allclose(
        got, hvp(lambda x: jce.cross_entropy_with_integer_labels(labels, x)), rtol=2e-5, atol=1e-37
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.slow
def test_all_tokens_masked(problem, reduction):
    labels, h, w, b = problem
    for options in ({"where": np.zeros(labels.shape, bool)}, {"weights": np.zeros(labels.shape, np.float32)}):
        for x in (h, np.full_like(h, NAN)):
            value, gradients = value_and_gradients(labels, x, w, b, reduction=reduction, **options)
            assert value == 0
            for g in gradients:
                np.testing.assert_array_equal(g, np.zeros_like(g))


def test_derivative_with_respect_to_a_zero_weight_is_the_loss(problem):
    """The sum Σ wℓ is linear in w, also at w = 0. For a token with an invalid label or a NaN, the derivative is 0."""
    labels, h, w, b = problem
    losses = jce.linear_cross_entropy(labels, h, w, b, reduction="none")
    labels[0, 0], h[0, 1] = -100, NAN
    weights = np.zeros(labels.shape, np.float32)
    for reduction in ("sum", "none"):

        def total(weights, reduction=reduction):
            return jce.linear_cross_entropy(labels, h, w, b, weights=weights, reduction=reduction).sum()

        for g in (jax.grad(total)(weights), jax.jacfwd(total)(weights)):
            close(g[1], losses[1])
            close(g[0, 2:], losses[0, 2:])
            np.testing.assert_array_equal(g[0, :2], 0)


def test_derivative_with_respect_to_a_zero_weight_with_padded_labels(problem):
    """A label of -100 with probability 0 is padding. If its probability isn't 0, the zero-weight token is masked."""
    _, h, w, b = problem
    labels, p = np.array([[1, -100], [1, -100]]), np.float32([[1, 0], [0.5, 0.5]])

    def total(weights):
        return jce.linear_cross_entropy(labels, h[0, :2], w, b, label_probs=p, weights=weights, reduction="sum")

    gradient = jax.grad(total)(jnp.zeros(2))
    close(gradient[0], jce.linear_cross_entropy(1, h[0, 0], w, b))
    assert gradient[1] == 0


@pytest.mark.parametrize("how", ["where", "weight 0"])
@pytest.mark.slow
def test_masked_infinite_loss_does_not_change_derivatives_of_other_weights(problem, how):
    """One label is forbidden. The derivative at that token's weight of 0 is +∞, or 0 if `where` masks the token."""
    labels, h, w, b = problem
    labels = np.minimum(labels, 4)
    labels[0, 0], b[5] = 5, -INF
    kept = np.arange(8).reshape(2, 4) > 0
    weights = np.where(kept | (how == "where"), 1, 0).astype(np.float32)

    def mean(weights):
        return jce.linear_cross_entropy(labels, h, w, b, weights=weights, where=kept if how == "where" else None)

    losses = np.asarray(jce.linear_cross_entropy(labels, h, w, b, reduction="none"))[kept]
    assert np.isfinite(mean(weights))
    for g in (jax.grad(mean)(weights), jax.jacfwd(mean)(weights)):
        assert g[0, 0] == (0 if how == "where" else INF)
        close(g[kept], (losses - losses.mean()) / 7, rtol=1e-5)


@pytest.mark.holds_nan
@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1])
@pytest.mark.in_turn(3)
def test_an_invalid_label_makes_only_its_own_token_nan(problem, wrong):
    labels, h, w, b = problem
    losses, jacobian = (
        f(lambda h: jce.linear_cross_entropy(labels, h, w, b, reduction="none", chunk_size=3))(h)
        for f in (lambda f: f, jax.jacrev)
    )
    labels = labels.copy()
    labels[0, 1] = wrong
    wrong_losses, wrong_jacobian = (
        f(lambda h: jce.linear_cross_entropy(labels, h, w, b, reduction="none", chunk_size=3))(h)
        for f in (lambda f: f, jax.jacrev)
    )
    others = np.arange(8).reshape(2, 4) != 1
    assert np.isnan(wrong_losses[0, 1])
    assert np.isnan(wrong_jacobian[0, 1, 0, 1]).all()
    np.testing.assert_array_equal(wrong_losses[others], losses[others])
    np.testing.assert_array_equal(wrong_jacobian[others][:, others], jacobian[others][:, others])
    value, (dh, _, _) = value_and_gradients(labels, h, w, b)
    assert np.isnan(value)
    assert not np.isnan(dh[others]).any()


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.in_turn(2)
def test_a_forbidden_class(problem, cap):
    """Derivatives are those of a head without the forbidden class. The loss of a forbidden label is infinite."""
    labels, h, w, b = problem
    labels = np.minimum(labels, 4)
    shorter = value_and_gradients(labels, h, w[:5], b[:5], logit_soft_cap=cap)
    b = np.where(np.arange(6) == 5, np.float32(-INF), b)
    value, (dh, dw, db) = value_and_gradients(labels, h, w, b, logit_soft_cap=cap)
    close((value, (dh, dw[:5], db[:5])), shorter)
    np.testing.assert_array_equal(dw[5], 0)
    assert db[5] == 0

    @jax.jit
    def product(a, t):
        gradient = jax.grad(
            lambda *a: jce.linear_cross_entropy(labels, *a, logit_soft_cap=cap, chunk_size=3), (0, 1, 2)
        )
        return jax.jvp(gradient, a, t)[1]

    hvp = product((h, w, b), (h, w, np.ones_like(b)))
    expected = product((h, w[:5], b[:5]), (h, w[:5], np.ones_like(b[:5])))
    close((hvp[0], hvp[1][:5], hvp[2][:5]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hvp[1][5], 0)
    forbidden = np.where(np.arange(8).reshape(2, 4) == 0, 5, labels)
    losses = jce.linear_cross_entropy(forbidden, h, w, b, reduction="none", logit_soft_cap=cap)
    assert losses[0, 0] == INF
    assert np.isfinite(losses.ravel()[1:]).all()


def test_gradient_of_a_logit_far_above_its_soft_cap():
    """The slope of tanh at 9 is 6e-8. Computed as 1 - tanh² in float32, the slope would be 0 from there on."""
    h = np.float32([[30.0, 0.0]])

    def loss(h):
        return jce.linear_cross_entropy(np.array([1]), h, np.eye(2, dtype=np.float32), logit_soft_cap=1.0)

    slope = 4 * np.exp(-60.0)
    q = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(jax.grad(loss)(h), [[q * slope, -q]], rtol=1e-6)


@pytest.mark.slow
def test_a_huge_soft_cap_has_no_effect(problem):
    """Log-probabilities and derivatives of order 1 to 3, if logit / cap is subnormal, so that XLA flushes it to 0."""
    labels, h, w, b = problem

    def derivatives(**options):
        def gradient(h):
            return jax.grad(lambda h: jce.linear_cross_entropy(labels, h, w, b, **options))(h)

        def hvp(h):
            return jax.jvp(gradient, (h,), (h,))

        return jce.linear_log_probs(labels, h, w, b, **options), jax.jit(lambda h: jax.jvp(hvp, (h,), (h,)))(h)

    close(derivatives(logit_soft_cap=1e38), derivatives(), rtol=1e-5)


def test_a_tiny_soft_cap_flattens_all_logits_except_forbidden_ones():
    losses = jce.linear_cross_entropy(
        [0, 1], np.float32([[9], [-9]]), np.float32([[1], [0], [0]]), np.float32([0, 0, -INF]), logit_soft_cap=2e-38
    )
    np.testing.assert_allclose(losses, math.log(2), rtol=1e-6)


# Traced numbers


@pytest.mark.slow
def test_a_traced_0_has_no_effect_for_any_logits(problem):
    """Traced zeros for smoothing and z-loss, with a forbidden class and a logit whose square overflows."""
    labels, h, w, b = problem
    labels, b[5] = np.minimum(labels, 4), -INF
    h[0, 0] *= 1e25

    def dense(h, **smoothing):
        logits = jnp.where(np.arange(6) == 5, -INF, h @ w.T)
        return jce.cross_entropy_with_integer_labels(labels, logits, **smoothing).sum()

    def head(h, **numbers):
        sums = [jce.linear_cross_entropy(labels, h, w, b, reduction=r, **numbers).sum() for r in ("sum", "none")]
        return sums[0] + jnp.sin(sums[1] / 1e25)

    def program(loss):
        def derivatives(h, **numbers):
            def gradient(h):
                return jax.value_and_grad(lambda h: loss(h, **numbers))(h)

            return jax.jvp(gradient, (h,), (h,))

        return jax.jit(derivatives)

    zeros = {name: np.zeros((), np.float32) for name in ("label_smoothing", "z_loss")}
    close(program(dense)(h, label_smoothing=np.zeros((), np.float32)), program(dense)(h))
    close(program(head)(h, **zeros), program(head)(h))


@pytest.mark.holds_nan
def test_a_traced_label_smoothing_of_1_still_needs_a_valid_label(problem):
    labels, h, w, b = problem
    b[0] = labels[0, 0] = 0
    labels[0, 1] = 6
    losses, dense = jax.jit(
        lambda e: (
            jce.linear_cross_entropy(labels, h, w, b, label_smoothing=e, reduction="none"),
            jce.cross_entropy_with_integer_labels([0, 1], np.float32([[-1e38] * 2] * 2), label_smoothing=e),
        )
    )(1.0)
    np.testing.assert_array_equal(np.isnan(losses).ravel(), np.arange(8) == 1)
    np.testing.assert_allclose(dense, math.log(2), rtol=1e-6)


@pytest.mark.slow
def test_derivatives_with_respect_to_a_traced_cap(problem):
    """Derivatives of order 1 and 2 with respect to the cap and the hidden states, and one with respect to `z_loss`."""
    labels, h, w, b = (np.float64(x) if x.dtype == np.float32 else x for x in problem)
    labels, h = labels.ravel(), h.reshape(-1, h.shape[-1])

    def ours(cap, z, h):
        return jce.linear_cross_entropy(labels, h, w, b, reduction="sum", logit_soft_cap=cap, z_loss=z)

    def theirs(cap, z, h):
        return dense_head.losses(labels, h, w, b, z_loss=z, logit_soft_cap=cap).sum()

    def derivatives(f):
        second = lambda cap, z, h: jax.jvp(jax.grad(lambda cap, h: f(cap, z, h), (0, 1)), (cap, h), (1.0, h / 2))  # noqa: E731
        return jax.jit(lambda *arguments: [jax.grad(f, 1)(*arguments), second(*arguments)])(2.0, 0.01, h)

    with jax.enable_x64(True):
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-9), derivatives(ours), derivatives(theirs))


@pytest.mark.slow
def test_a_traced_cap_does_not_change_forbidden_classes(problem):
    """For caps of 2 and 1e30, value and derivatives (also with respect to the cap) are those without the class."""
    labels, h, w, b = problem
    labels, b[5] = np.minimum(labels, 4), -INF

    def derivatives(n):
        def losses(h, cap):
            both = jce.linear_log_probs(labels, h, w[:n], b[:n], logit_soft_cap=cap)
            return jce.linear_cross_entropy(labels, h, w[:n], b[:n], logit_soft_cap=cap) + sum(x.sum() for x in both)

        def square(*a):
            return sum(jnp.vdot(g, g) for g in jax.grad(losses, (0, 1))(*a))

        return jax.jit(lambda *a: (losses(*a), jax.value_and_grad(square, (0, 1))(*a)))

    programs = [derivatives(n) for n in (6, 5)]
    for cap in np.float32([2.0, 1e30]):
        close(*(program(h, cap) for program in programs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_traced_numbers_act_like_python_numbers(problem):
    """Traced numbers work in a batch, on a mesh and as eager arrays. A float64 number doesn't make the loss float64."""
    labels, h, w, b = problem
    labels = labels.astype(np.int32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    over = {"mesh": mesh, "token_axis": "data", "class_axis": "model"}
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_soft_cap": 3.0}

    def both(numbers):
        def total(h, numbers):
            ours = jce.linear_cross_entropy(labels, h, w, b, **numbers)
            sharded = jce.on_mesh(jce.linear_cross_entropy, **over)(labels, h, w, b, **numbers)
            smoothing = {"label_smoothing": numbers["label_smoothing"]}
            dense = jce.cross_entropy_with_integer_labels(labels, h @ w.T, **smoothing)
            return ours + 2 * sharded + 3 * dense.mean()

        return jax.value_and_grad(total)(h, numbers), numbers

    (expected, _), (got, _) = jax.jit(lambda: both(numbers))(), jax.jit(both)(numbers)
    close(got, expected)
    halves = jax.tree.map(lambda x: x / 2, numbers)
    batch = jax.tree.map(lambda *x: np.float32(x), numbers, halves)
    batched = jax.jit(jax.vmap(lambda n: jce.linear_cross_entropy(labels, h, w, b, **n)))(batch)
    close(batched, [jce.linear_cross_entropy(labels, h, w, b, **n) for n in (numbers, halves)])
    with jax.enable_x64(True):
        wide = jce.linear_cross_entropy(labels, h, w, b, **jax.tree.map(jnp.float64, numbers))
    assert wide.dtype == np.float32
    close(wide, batched[0])
    close(
        jce.linear_cross_entropy(labels, h, w, b, label_smoothing=np.array(1)),
        jce.linear_cross_entropy(labels, h, w, b, label_smoothing=1),
    )


def test_a_traced_number_with_sharded_logits(rng):
    """The derivative with respect to the smoothing is summed over all devices, also on a mesh with explicit axes."""
    labels, x = rng.integers(0, 6, 8), rng.standard_normal((8, 6)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))

    def loss(labels, x, smoothing):
        return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=smoothing).sum()

    program = jax.jit(jax.value_and_grad(loss, (1, 2)))
    expected = program(labels, x, 0.1)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("rows"))
        close(program(jax.device_put(labels, rows), jax.device_put(x, rows), 0.1), expected)


# Transforms


def dense_mean(labels, h, w):
    return jce.cross_entropy_with_integer_labels(labels, h @ w.T).mean()


def linear_mean(labels, h, w):
    return jce.linear_cross_entropy(labels, h, w, chunk_size=3)


def test_a_batch_of_means(problem):
    """Under vmap, one loop runs over the tokens of all batch entries, but each entry has its own mean and gradient."""
    labels, h, w, _ = problem

    def of_batch(loss, h, w):
        means = jax.vmap(loss, (0, 0, None))(labels, h, w)
        return jnp.vdot(jnp.arange(1.0, 1 + len(means)), means), means

    @jax.jit
    def run(h, w):
        return [
            jax.value_and_grad(lambda *x, f=f: of_batch(f, *x), (0, 1), has_aux=True)(h, w)
            for f in (linear_mean, dense_mean)
        ]

    @jax.jit
    def values(h, w):
        return [of_batch(f, h, w)[1] for f in (linear_mean, dense_mean)]

    for program in (run, values):
        close(*program(h, w))


@pytest.mark.slow
def test_vmap_over_tokens_and_over_heads(problem):
    labels, h, w, _ = problem
    gradient, expected = (jax.value_and_grad(f, (1, 2)) for f in (linear_mean, dense_mean))
    heads = np.stack([w, 2 * w, -w])
    for axes, a in (
        ((0, 0, None), (labels, h, w)),
        ((None, None, 0), (labels, h, heads)),
        ((None, 0, 0), (labels[0], h, heads[:2])),
    ):
        close(jax.vmap(gradient, axes)(*a), jax.vmap(expected, axes)(*a))
        close(
            jax.vmap(jax.hessian(linear_mean, 1), axes)(*a),
            jax.vmap(jax.hessian(dense_mean, 1), axes)(*a),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.slow
def test_checkpoint_and_scan_over_layers(problem):
    labels, h, w, _ = problem
    layers = np.stack([np.eye(3, dtype=np.float32) + 0.1 * i for i in range(3)])

    def network(layers, w, loss):
        out = jax.lax.scan(jax.checkpoint(lambda h, layer: (jnp.tanh(h @ layer), None)), h, layers)[0]
        return jax.checkpoint(loss)(labels, out, w)

    for f in (jax.grad(network, (0, 1)), jax.hessian(network, 1)):
        close(jax.jit(f, static_argnums=2)(layers, w, linear_mean), f(layers, w, dense_mean), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradient_of_a_jvp_and_gauss_newton_products(problem):
    labels, h, w, _ = problem
    layer = np.eye(3, dtype=np.float32) * 0.5

    def slope(w, loss):
        return jax.jvp(lambda w: loss(labels, h, w), (w,), (w * w,))[1]

    close(jax.grad(slope)(w, linear_mean), jax.grad(slope)(w, dense_mean), rtol=1e-5, atol=1e-6)

    def gauss_newton(layer, t, loss):
        """Jᵀ H J t, where J = ∂ states / ∂ layer, and H is the Hessian of the loss with respect to the states."""

        def states(layer):
            return jnp.tanh(h @ layer)

        out, dout = jax.jvp(states, (layer,), (t,))
        curved = jax.jvp(jax.grad(lambda s: loss(labels, s, w)), (out,), (dout,))[1]
        return jax.vjp(states, layer)[1](curved)[0]

    t = np.ones_like(layer)
    close(gauss_newton(layer, t, linear_mean), gauss_newton(layer, t, dense_mean), rtol=1e-5, atol=1e-6)


# Log-probabilities and entropy


@pytest.mark.slow
def test_log_probs_against_the_losses_of_dense_logits(problem):
    labels, h, w, b = problem
    where = np.arange(8).reshape(2, 4) != 2
    cap = 5.0

    def dense(h, w, b):
        x = cap * jnp.tanh((h @ w.T + b[None, None]) / cap)
        return -jce.cross_entropy_with_integer_labels(labels, x), jce.entropy_with_logits(x)

    def ours(h, w, b):
        return tuple(jce.linear_log_probs(labels, h, w, b, logit_soft_cap=cap, chunk_size=3))

    def total(f):
        return lambda *a: sum(jnp.vdot(np.arange(8, dtype=np.float32), x.ravel()) for x in f(*a))

    a = (h, w, b)
    close(ours(*a), dense(*a))
    close(jax.grad(total(ours), (0, 1, 2))(*a), jax.grad(total(dense), (0, 1, 2))(*a), rtol=1e-5, atol=1e-6)
    t = (np.ones_like(h), w, b)
    close(*(jax.jvp(jax.grad(total(f), (0, 1, 2)), a, t)[1] for f in (ours, dense)), rtol=2e-5, atol=1e-5)
    masked = jce.linear_log_probs(np.where(where, labels, -100), np.where(where[..., None], h, NAN), w, b, where=where)
    whole = jce.linear_log_probs(labels, h, w, b)
    for x, y in zip(masked, whole, strict=True):
        np.testing.assert_array_equal(x, np.where(where, y, 0))
    assert masked.log_prob is masked[0]
    assert masked.entropy is masked[1]


@pytest.mark.holds_nan
def test_log_probs_of_a_label_out_of_range(problem):
    labels, h, w, b = problem
    labels[0, 0] = 6
    log_prob, entropy = jce.linear_log_probs(labels, h, w, b)
    assert np.isnan(log_prob).sum() == 1
    assert np.isfinite(entropy).all()


def test_log_probs_of_a_confident_policy():
    log_prob, entropy = jce.linear_log_probs(0, np.float32([1, 0]), np.float32([[40, 0], [0, 0]]))
    np.testing.assert_allclose([log_prob, entropy], [-math.exp(-40), 41 * math.exp(-40)], rtol=1e-6)


# Errors


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": ones(4)}, TypeError, r"labels must be integers.*labels: float32\[4\].*target comes first"),
        ({"labels": ones(3, dtype=np.int32)}, ValueError, r"labels must have the shape.*\(4,\).*labels: int32\[3\]"),
        ({"head": ones(5, 2)}, ValueError, r"head \[n, d\].*head: float32\[5,2\].*The order is"),
        ({"head": ones(3, 5)}, ValueError, r"head \[n, d\].*head: float32\[3,5\].*Transpose the head"),
        ({"labels": 1, "hidden": ones(3), "head": ones(3, 5)}, ValueError, r"hidden: float32\[3\].*Transpose the head"),
        ({"head": ones(3)}, ValueError, r"head \[n, d\].*head: float32\[3\]"),
        ({"hidden": np.float32(1)}, ValueError, r"hidden must be.*hidden: float32\[\]"),
        ({"hidden": ones(4, 3, dtype=np.complex64)}, TypeError, r"must be real.*hidden: complex64\[4,3\]"),
        ({"bias": ones(4)}, ValueError, r"bias must have the shape \(5,\).*bias: float32\[4\]"),
        ({"weights": ones(3)}, ValueError, r"weights must broadcast.*\(4,\).*weights: float32\[3\].*weight per token"),
        ({"weights": ones(5)}, ValueError, r"weights must broadcast.*weights=weights\[labels\] looks up"),
        ({"where": ones(3, dtype=bool)}, ValueError, r"where must broadcast.*\(4,\).*where: bool\[3\].*masks tokens"),
        ({"where": ones(4)}, TypeError, r"where must be boolean.*where: float32\[4\].*where=mask != 0"),
        ({"reduction": "avg"}, ValueError, r'reduction must be "mean" or "sum" or "none"; got reduction=\'avg\''),
        ({"chunk_size": 0}, ValueError, r"chunk_size must be.*at least 1; got chunk_size=0"),
        ({"chunk_size": 2.0}, ValueError, r"chunk_size must be a static int.*got chunk_size=2.0"),
        ({"chunk_size": np.array(2)}, ValueError, r"chunk_size must be static.*got chunk_size: ndarray"),
        ({"chunk_size": jnp.int32(2)}, ValueError, r"chunk_size must be static.*x\.item\(\)"),
        ({"z_loss": ones(2)}, ValueError, r"z_loss must be a.*of shape \(\); got z_loss: float32\[2\].*jax.vmap"),
        ({"label_smoothing": jnp.array(True)}, ValueError, r"label_smoothing must be.*label_smoothing: bool\[\]"),
        ({"reductoin": "sum"}, TypeError, r"no argument 'reductoin'; it takes labels, hidden, head, bias, label_probs"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be.*0 to 1; got label_smoothing=1.5"),
        ({"z_loss": -1.0}, ValueError, r"z_loss must be at least 0; got z_loss=-1.0"),
        ({"logit_soft_cap": 0}, ValueError, r"logit_soft_cap must be greater than 0; got logit_soft_cap=0"),
        ({"logit_soft_cap": 1e39}, ValueError, r"logit_soft_cap must be.*got logit_soft_cap=1e\+39"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(change, error, message):
    arguments = {"labels": ones(4, dtype=np.int32), "hidden": ones(4, 3), "head": ones(5, 3)} | change
    common = {"labels", "hidden", "head", "bias", "where", "chunk_size", "logit_soft_cap"}
    for function in (jce.linear_cross_entropy, jce.linear_log_probs):
        if function is jce.linear_cross_entropy or set(change) <= common:
            with pytest.raises(error, match=message) as raised:
                function(**arguments)
            assert str(raised.value).startswith(f"{function.__name__}: ")


def test_fewer_classes_than_the_width(rng):
    """Gradients equal those of the dense loss, with weights and a bias."""
    y, shapes = np.arange(10) % 3, ((10, 8), (3, 8), (3,))
    h, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    weights = np.linspace(0.5, 2, 10, dtype=np.float32)

    def ours(h, w, b):
        return jce.linear_cross_entropy(y, h, w, b, weights=weights, reduction="sum", chunk_size=4)

    def dense(h, w, b):
        return (weights * jce.cross_entropy_with_integer_labels(y, h @ w.T + b[None])).sum()

    gradients = jax.jit(lambda *x: [jax.grad(f, (0, 1, 2))(*x) for f in (ours, dense)])(h, w, b)
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.holds_nan
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_label_out_of_range_with_fewer_classes_than_the_width(reduction):
    """If there are fewer classes than the hidden states' width, r multiplies e (`jce/_heads/loss/label_loss.py`)."""

    def loss(h, w):
        return jce.linear_cross_entropy(np.array([1, 7]), h, w, reduction=reduction).sum()

    of_hidden, of_head = jax.grad(loss, (0, 1))(np.ones((2, 8), np.float32), np.ones((3, 8), np.float32))
    assert np.isfinite(of_hidden[0]).all()
    assert np.isnan(of_hidden[1]).all()
    assert np.isnan(of_head).all()
