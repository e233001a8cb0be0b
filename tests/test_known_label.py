"""Tests of the loss of a label in one pass over its row: every shift, rows that need a second pass, and costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.hlo import collectives
from jce._jax import platforms as _platforms
from jce._softmax.known_label import at_maximum, off_known_label
from tests.optimized_jit import optimized_jit

OFFSETS = (-60, -40, -30, -17, -16, -15, -8, -3, 0, 3, 14, 30, 39, 40, 41, 60)
loss = jce.cross_entropy_with_integer_labels
of_a_cpu = pytest.mark.skipif(not _platforms.CPU.is_cpu, reason="rows are read once only on a CPU")


GRADIENT, PENALIZED = (optimized_jit(jax.grad(lambda y, x, z=z: loss(y, x, z_loss=z).sum(), 1)) for z in (0.0, 0.1))


def exact(y, x, z_loss=0.0):
    """Value and gradient in float64, without cancellation."""
    x = x.astype(np.float64)
    m, at, is_label = x.max(-1), np.take_along_axis(x, y[:, None], -1)[:, 0], np.arange(x.shape[-1]) == y[:, None]
    with np.errstate(all="ignore"):
        e = np.where(is_label, 0, np.exp(x - m[:, None]))
        s, d = e.sum(-1), m - at
        z = s + np.exp(-d)
        surprisal = np.where(d == 0, np.log1p(s), d + np.log(z))
    log_sum = at + surprisal
    q = np.where(is_label, np.exp(-d)[:, None], e) / z[:, None]
    excess = np.where(is_label, -(s / z)[:, None], q) + 2 * z_loss * log_sum[:, None] * q
    return surprisal + z_loss * log_sum**2, excess, q


def rows(rng, n, offset, depth, count=24):
    """The label is `depth` below the highest other logit, which is near the offset."""
    x = 1.5 * rng.standard_normal((count, n)) + offset
    y = rng.integers(0, n, count)
    x[np.arange(count), y] = -np.inf
    x[np.arange(count), y] = x.max(-1) - depth
    return y, x.astype(np.float32)


def within(found, true, ulps, scale=None):
    with np.errstate(invalid="ignore"):
        unit = np.spacing(np.abs(true if scale is None else scale).astype(np.float32)).astype(np.float64)
        error = np.abs(np.asarray(found, np.float64) - true) / unit
    is_normal = np.abs(true) > 1e-30  # smaller entries may be 0
    assert np.nanmax(np.where(is_normal, error - ulps, 0)) <= 0


@pytest.mark.parametrize("n", [2, 1000])
@pytest.mark.in_turn(2)
def test_every_offset(n, rng):
    """Errors are some ulps, plus the effect of half an ulp of each difference. A shift of 0 causes no such rounding."""
    if n == 1000 and not _platforms.CPU.is_cpu:
        pytest.skip("many classes are summed one after another")
    for offset, depth in itertools.product(OFFSETS, (-80, -40, -20, -5, 0, 5, 20, 50, 80)):
        y, x = rows(rng, n, offset, depth)
        value, excess, _ = exact(y, x)
        rounding = np.ptp(x.astype(np.float64), -1, keepdims=True) / 2
        within(loss(y, x), value, 5 + rounding[:, 0] * (depth < 0))
        within(GRADIENT(y, x), excess, 9 + rounding)
        value, excess, q = exact(y, x, 0.1)
        terms = np.abs(value) + 0.2 * np.square(np.abs(x).max(-1))
        within(loss(y, x, z_loss=0.1), value, 9, terms)
        within(PENALIZED(y, x), excess, 12 + rounding, np.abs(excess) + q * 20)


@of_a_cpu
@pytest.mark.parametrize("n", [10, 1000])
def test_ordinary_logits_are_not_rounded(n, rng):
    """Errors are a few ulps, wherever the label's logit is. A difference from the maximum would add ulps."""
    for offset, depth in ((3, 0), (3, 10), (10, -20), (30, 20)):
        y, x = rows(rng, n, offset, depth, 200)
        value, excess, _ = exact(y, x)
        within(loss(y, x), value, 5)
        within(GRADIENT(y, x), excess, 6)


def test_labels_far_from_other_classes():
    """No class is lost: neither those far below a label that is itself low, nor those far above."""
    x = np.float32(
        [[-8, -20], [-15, -90], [-15.9, -80], [-16.1, -90], [0, -80], [39, -40], [-10, 70], [30, 80], [-90, -99]]
    )
    y = np.zeros(len(x), int)
    value, excess, _ = exact(y, x)
    np.testing.assert_allclose(loss(y, x), value, rtol=2e-6)
    np.testing.assert_allclose(GRADIENT(y, x), excess, rtol=6e-6)
    with jax.enable_x64(True):
        x = np.concatenate(
            [x.astype(float), np.array([[-15, -700.0], [-15.5, -690], [100, -590], [-700, -90], [-10, 450]])]
        )
        y = np.zeros(len(x), int)
        value, excess, _ = exact(y, x)
        np.testing.assert_allclose(loss(y, x), value, rtol=1e-14)
        np.testing.assert_allclose(GRADIENT(y, x), excess, rtol=1e-13)


def test_a_small_log_sum():
    """If the label outweighs all others, L is the label's logit and stays accurate, although Z near 1 is rounded."""
    x, y = np.float32([[1e-4, -30], [-2e-3, -40]]), np.zeros(2, int)
    value, excess, _ = exact(y, x, 0.1)
    np.testing.assert_allclose(loss(y, x, z_loss=0.1), value, rtol=2e-6)
    np.testing.assert_allclose(PENALIZED(y, x), excess, rtol=2e-6)


# Which rows are read again


def maxima_asked(at, others):
    """How often the maximum is requested, for rows of a label's logit and one other logit."""
    asked = []

    def maximum():
        asked.append(1)
        return jnp.maximum(at, others)

    at, others = jnp.float32(at), jnp.float32(others)
    with jax.disable_jit():
        sums = lambda m: [jnp.exp(others - m)]  # noqa: E731
        m, s = off_known_label(at, sums, at_maximum(sums, maximum), 80.0)
    at, others = (np.float64(a) for a in (at, others))
    np.testing.assert_allclose(jnp.log1p(s * jnp.exp(m - at)), np.log1p(np.exp(others - at)), rtol=1e-6, atol=1e-30)
    return len(asked)


@pytest.mark.parametrize(
    ("at", "other", "asked"),
    [
        (0, -np.inf, 0),  # a row that `where` masks fully or to one class
        (12, -np.inf, 0),
        (2, -80, 0),
        (50, 20, 0),
        (-30, -27, 0),
        (-15, -30, 0),
        (-2, 40, 0),
        (-2, -90, 1),
        (-2, 60, 1),
        (-30, -20, 1),
        (50, 70, 1),
    ],
)
@pytest.mark.in_turn(2, "wide")
def test_rows_that_request_their_maximum(at, other, asked):
    assert maxima_asked([at], [other]) == asked
    assert maxima_asked([1.0, at, 1.0], [2.0, other, 2.0]) == asked


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap], ids=["rows", "vmap"])
@pytest.mark.in_turn(2)
def test_a_row_that_is_read_again_does_not_change_other_rows(transform, rng):
    y, x = rng.integers(0, 100, (4, 16)), (3 * rng.standard_normal((4, 16, 100))).astype(np.float32)
    far = x.copy()
    far[2, 5] += 150
    for f in (optimized_jit(transform(loss)), optimized_jit(transform(jax.grad(lambda y, x: loss(y, x).sum(), 1)))):
        one, other = np.array(f(y, x)), np.array(f(y, far))
        assert np.isfinite(other).all()
        one[2, 5] = other[2, 5] = 0
        np.testing.assert_array_equal(one, other)


# Cost


@of_a_cpu
@pytest.mark.needs_jit
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA fused less")
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=["plain", "z-loss"])
@pytest.mark.parametrize("shape", [(1024, 1000), (16, 64, 1000), (64, 50_000)])
@pytest.mark.in_turn(6)
def test_nothing_of_the_inputs_size_is_stored(shape, options):
    """Under vmap too, all rows share one condition. With one condition per row, both passes would always run."""
    y, x = jax.ShapeDtypeStruct(shape[:-1], np.int32), jax.ShapeDtypeStruct(shape, np.float32)

    def temporaries(f):
        return optimized_jit(f).lower(y, x).compile().memory_analysis().temp_size_in_bytes / (4 * np.prod(shape))

    def gradient(y, x):
        return jax.value_and_grad(lambda x: loss(y, x, **options).sum())(x)

    assert temporaries(lambda y, x: loss(y, x, **options)) < 0.1
    assert temporaries(gradient) < 0.1
    assert temporaries(jax.vmap(lambda y, x: loss(y, x, **options))) < 0.1
    assert temporaries(jax.vmap(gradient)) < 0.1


def on_devices(kind):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("rows")))  # noqa: E731
    return mesh, put(np.zeros(64, np.int32)), put(np.zeros((64, 40), np.float32))


@of_a_cpu
@pytest.mark.needs_jit
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=["plain", "z-loss"])
@pytest.mark.in_turn(4)
def test_rows_on_several_devices_need_no_communication(kind, options):
    mesh, y, x = on_devices(kind)
    f = lambda y, x: loss(y, x, **options)  # noqa: E731
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda y, x: f(y, x).sum(), 1)
        for g in (f, gradient, jax.vmap(loss)):
            assert not collectives(optimized_jit(g).lower(y, x).compile().as_text())


@of_a_cpu
@pytest.mark.needs_jit
def test_each_device_of_a_shard_map_reads_its_own_rows_again(rng):
    mesh, y, x = on_devices(AxisType.Auto)
    f = jax.shard_map(loss, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    text = optimized_jit(f).lower(y, x).compile().as_text()
    assert not collectives(text)
    assert " while(" in text
    x = np.where(np.arange(64)[:, None] == 9, 90, 1).astype(np.float32) * rng.standard_normal((64, 40))
    x = x.astype(np.float32)
    np.testing.assert_array_equal(optimized_jit(f)(y, x), loss(np.asarray(y), x))
