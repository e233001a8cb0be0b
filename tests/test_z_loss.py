"""The z-loss of dense logits, with targets of every kind, compared with a manual float64 formula in every mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce

ROWS, CLASSES = 5, 7
TARGETS = {"labels": {}, "smoothed": {"label_smoothing": 0.1}, "list": {}, "list and tail": {"tail": True}, "soft": {}}
LOSSES = (jce.cross_entropy_with_integer_labels, jce.cross_entropy_with_logits)


@pytest.mark.parametrize("traced", [pytest.param(False, marks=pytest.mark.slow), True], ids=["a number", "traced"])
@pytest.mark.parametrize("of", TARGETS)
@pytest.mark.in_turn(5, "wide")
def test_values_and_derivatives(of, traced, rng):
    """Derivatives with respect to logits and ζ, up to third order, with masked classes, along the first axis."""
    x, direction = (3 * rng.standard_normal((CLASSES, ROWS)) for _ in range(2))
    y, weights = rng.integers(1, CLASSES - 1, ROWS), rng.standard_normal(ROWS)
    labels = np.stack([y, y - 1], 1) if "list" in of else y
    probs = np.full((ROWS, 2), 0.4) if "list" in of else np.ones((ROWS, 1))
    kept = (np.arange(CLASSES) < CLASSES - 1)[:, None]
    lists = {"label_probs": probs} if "list" in of else {}
    smoothing, p = TARGETS[of].get("label_smoothing", 0.0), rng.dirichlet(np.ones(CLASSES), ROWS).T

    def ours(x, z_loss):
        if of == "soft":
            return (weights * jce.cross_entropy_with_logits(p, x, axis=0, where=kept, z_loss=z_loss)).sum()
        losses = jce.cross_entropy_with_integer_labels(
            labels, x, axis=0, where=kept, z_loss=z_loss, **lists, **TARGETS[of]
        )
        return (weights * losses).sum()

    def by_hand(x, z_loss):
        x = x[:-1]
        log_z = jax.nn.logsumexp(x, 0)
        surprisals = log_z[None] - x
        at = jnp.take_along_axis(surprisals.T, labels.reshape(ROWS, -1), 1)
        losses = (1 - smoothing) * (at * probs).sum(1) + smoothing * surprisals.mean(0)
        if of == "list and tail":
            losses -= (1 - probs.sum(1)) * jnp.log1p(-jnp.exp(-at).sum(1))
        if of == "soft":
            losses = (p[:-1] * surprisals).sum(0)
        return (weights * (losses + z_loss * log_z**2)).sum()

    def everything(f):
        f = f if traced else (lambda x, _, f=f: f(x, 0.3))
        gradient, along = jax.grad(f, (0, 1)), (direction, 0.7)

        def tangent(*a):
            return jax.jvp(gradient, a, along)[1]

        def pulled(*a):
            return sum(jnp.vdot(g, t) for g, t in zip(gradient(*a), along, strict=True))

        run = jax.jit(
            lambda *a: (f(*a), gradient(*a), tangent(*a), jax.jvp(tangent, a, along)[1], jax.grad(pulled)(*a))
        )
        return run(jnp.asarray(x), jnp.asarray(0.3))

    with jax.enable_x64(True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), everything(ours), everything(by_hand)
        )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.in_turn(2)
def test_a_masked_row_and_a_z_loss_of_0(loss):
    """A fully masked row is 0. A traced ζ of 0 means no z-loss, whatever L is. A Python 0 costs nothing."""
    x, y = jnp.asarray([[1.0, 2.0], [3.0, -jnp.inf]]), jnp.asarray([0, 0])
    y = y if loss is LOSSES[0] else jax.nn.one_hot(y, 2)
    np.testing.assert_array_equal(loss(y, x, z_loss=0.5, where=jnp.asarray([[False], [True]])), [0, 4.5])
    np.testing.assert_array_equal(loss(y, x, z_loss=jnp.zeros(())), loss(y, x))
    np.testing.assert_array_equal(loss(y, 1e20 * x, z_loss=jnp.zeros(())), loss(y, 1e20 * x))  # L² is +∞

    def text(**options):
        return jax.jit(lambda y, x: loss(y, x, **options)).lower(y, x).as_text()

    assert text() == text(z_loss=0.0) != text(z_loss=0.1)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_wrong_arguments(loss):
    y = 0 if loss is LOSSES[0] else np.ones(3)
    for wrong in (-1.0, np.ones(2)):
        with pytest.raises(ValueError, match=rf"{loss.__name__}: z_loss must be a"):
            loss(y, np.ones(3), z_loss=wrong)


@pytest.mark.parametrize("of", ["labels", "smoothed", "soft targets", "a head", "a list under a head"])
@pytest.mark.in_turn(3)
def test_a_square_that_overflows(of):
    """ζL² is finite although L² overflows, for a Python number ζ and a traced one."""
    x, label = np.float32([[-3.22e19, 5.09e19]]), np.array([1])
    head, probs = np.eye(2, dtype=np.float32), np.ones((1, 1), np.float32)
    losses = {
        "labels": lambda z: jce.cross_entropy_with_integer_labels(label, x, z_loss=z),
        "smoothed": lambda z: jce.cross_entropy_with_integer_labels(label, x, z_loss=z, label_smoothing=1e-20),
        "soft targets": lambda z: jce.cross_entropy_with_logits(np.float32([[0, 1]]), x, z_loss=z),
        "a head": lambda z: jce.linear_cross_entropy(label, x, head, z_loss=z),
        "a list under a head": lambda z: jce.linear_cross_entropy(label[None], x, head, label_probs=probs, z_loss=z),
    }
    for z_loss in (0.1, np.float32(0.1)):
        np.testing.assert_allclose(losses[of](z_loss), 2.59081e38, rtol=1e-6)
