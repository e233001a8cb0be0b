"""Accuracy near the uniform distribution, compared with float64.

Entropy bonuses and label smoothing start there. log 1/qᵢ, H and losses are all near log n, and derivatives are small
differences between them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from tests.optimized_jit import optimized_jit

ROWS, CLASSES = 300, 8
EPS = np.finfo(np.float32).eps
SPREADS = [1e-5, 1e-2, 1.0]
SMOOTHING = 0.1
HEAD = np.eye(CLASSES, dtype=np.float32)
LEGAL = np.arange(CLASSES) < CLASSES - 1
LABELS = np.arange(ROWS, dtype=np.int32) % (CLASSES - 1)
LISTS, PROBS = np.stack([LABELS, (LABELS + 2) % (CLASSES - 1)], 1), np.float32([0.6, 0.25])

each_spread = pytest.mark.parametrize("spread", SPREADS)


def in_both(function, *arrays):
    """The function's results in float32 and, for the same numbers, in float64."""
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            yield jax.tree.map(np.float64, optimized_jit(function)(*(x.astype(dtype) for x in arrays)))


def assert_near(found, unit, eps):
    for got, exact, u in zip(*found, unit, strict=True):
        assert (np.abs(got - exact) <= eps * EPS * u).all(), np.max(np.abs(got - exact) / u) / EPS


def logits(rng, spread):
    return np.float32(spread * rng.standard_normal((ROWS, CLASSES)))


def largest(x):
    return np.abs(x).max(-1, keepdims=True)


@each_spread
@pytest.mark.parametrize("of", ["logits", "a head"])
@pytest.mark.slow
def test_derivatives_of_entropy(of, spread, rng):
    """Gradients, Hessian-vector products and, for a head, the derivative with respect to the temperature."""
    x, t = logits(rng, spread), np.float32(rng.standard_normal((ROWS, CLASSES)))
    kept = np.full(ROWS, 0.7, np.float32)

    def total(x, temperature):
        if of == "logits":
            return jce.entropy_with_logits(x).sum()
        return jce.linear_log_probs(LABELS, x, HEAD.astype(x.dtype), temperature=temperature).entropy.sum()

    def derivatives(x, t, temperature):
        gradient = jax.grad(total, (0, 1))
        return *gradient(x, temperature), jax.jvp(lambda x: gradient(x, temperature)[0], (x,), (t,))[1]

    got, exact = in_both(derivatives, x, t, kept)
    in_x, in_temperature, hvp = exact
    assert_near((got, exact), (largest(in_x), np.abs(in_temperature), largest(hvp)), 16 if spread < 1 else 40)


def losses(of, x, smoothing):
    dtype, labels, options = x.dtype, LABELS, {}
    if "list" in of:
        labels, options = LISTS, {"label_probs": jnp.broadcast_to(PROBS.astype(dtype), LISTS.shape)}
    if "head" in of:
        return jce.linear_cross_entropy(
            labels, x, HEAD.astype(dtype), label_smoothing=smoothing, reduction="none", **options
        )
    where = LEGAL if "legal" in of else None
    return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=smoothing, where=where, **options)


def difference_of_targets(of):
    """The uniform target minus the given one, with equal sums: minus the weights of x in the derivative."""
    taken = PROBS if "list" in of else np.float32([1])
    given = (np.eye(CLASSES)[LISTS if "list" in of else LABELS[:, None]] * taken[:, None]).sum(1)
    uniform = LEGAL / LEGAL.sum() if "legal" in of else np.full(CLASSES, 1 / CLASSES)
    return np.float64(taken).sum() * uniform - given


@each_spread
@pytest.mark.parametrize("of", ["labels", "legal classes", "a list", "a head", "a head and a list"])
@pytest.mark.in_turn(5)
def test_derivatives_with_respect_to_smoothing(of, spread, rng):
    """The derivative is -Σ (uᵢ - pᵢ) xᵢ, with an error relative to the spread of the row's logits.

    Both modes are tested, and second derivatives with respect to the logits.
    """
    x, smoothing = logits(rng, spread), np.float32(SMOOTHING)

    def derivatives(x):
        forward = jax.jvp(lambda s: losses(of, x, s), (smoothing,), (np.float32(1),))[1]
        reverse = jax.grad(lambda s: losses(of, x, s)[0])(smoothing)
        in_x = jax.grad(lambda x: jax.grad(lambda s: losses(of, x, s).sum())(smoothing))(x)
        in_smoothing = jax.jvp(jax.grad(lambda x, s: losses(of, x, s).sum()), (x, smoothing), (0 * x, np.float32(1)))[1]
        return forward, reverse, in_x, in_smoothing

    mixed = -difference_of_targets(of)
    exact = (mixed * np.float64(x)).sum(-1)
    spreads = np.ptp(x, axis=-1)
    found = jax.tree.map(np.float64, optimized_jit(derivatives)(x)), (exact, exact[0], mixed, mixed)
    assert_near(found, (spreads, spreads[0], 1, 1), 4)


@pytest.mark.holds_nan
@pytest.mark.slow
def test_derivatives_with_respect_to_smoothing_at_edge_cases():
    """A row without a distribution is NaN. With a class of probability 0 the derivative is +∞, or NaN at the label."""
    inf, nan = np.inf, np.nan
    x = np.float32([[0, 0, 1], [nan, 0, 0], [inf, 0, 0], [-inf, -inf, -inf], [0, 0, -inf], [-inf, 0, 0], [0, 0, 0]])
    labels = np.array([0, 0, 1, 0, 0, 0, 3])

    def loss(s):
        return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=s)

    def in_logits(x):
        return jax.grad(lambda s: jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=s).sum())(s)

    s = np.float32(SMOOTHING)
    found = jax.jvp(loss, (s,), (np.float32(1),))[1]
    mixed = jax.grad(in_logits)(x)
    np.testing.assert_allclose(found, [-1 / 3, nan, nan, nan, inf, nan, nan], rtol=1e-6)
    expected = np.float32([2, -1, -1]) / 3
    np.testing.assert_allclose(mixed[np.array([0, 4])], [expected] * 2, rtol=1e-6)
    assert np.isnan(mixed[np.array([1, 2, 3, 6])]).all()


@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_a_smoothed_loss_ignores_an_offset_of_the_logits(smoothing, rng):
    """At an offset of 39 a label's sum needs no maximum, but a mean does: log Σ exp x is near 39 + log n."""
    x = np.float32(39) + logits(rng, 1e-3)

    def loss(x):
        return jce.cross_entropy_with_integer_labels(LABELS, x, label_smoothing=smoothing)

    got, exact = in_both(loss, x)
    assert_near((got[None], exact[None]), np.log(CLASSES) * np.ones((1, 1)), 2)
