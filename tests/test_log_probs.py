"""Log-probabilities of k labels per row and of the tail: accuracy, edge cases, and divergences between them."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jce
from jce._jax.classes import Classes
from jce._quantities.label_log_probs import _log_probs, _sums
from tests.kernels import modes
from tests.optimized_jit import optimized_jit
from tests.test_devices import make_mesh

INF, NAN = np.inf, np.nan
log_probs = jce.log_probs_with_integer_labels
with_tail = pytest.mark.parametrize("tail", [False, True], ids=["no tail", "tail"])


def rows(rng, count, n, k, dtype):
    """Logits where nearly all probability is at the first label, at other classes, or spread."""
    x = 3 * rng.standard_normal((count, n))
    y = np.stack([rng.choice(n, k, replace=False) for _ in range(count)])
    x[np.arange(count), y[:, 0]] = x.max(1) + np.resize([-20, 0, 5, 20, 60], count)
    listed = np.zeros((count, n), bool)
    np.put_along_axis(listed, y, True, 1)
    x += np.where(listed, 0, np.resize([0, 0, 0, 12, 0, 30], count)[:, None])
    return y, x.astype(dtype)


def truth(y, x):
    """k + 1 values, and their derivatives with respect to each logit, in 300 bits."""
    with mp.workprec(300):
        e = [mp.exp(mp.mpf(float(v))) for v in x]
        q = [v / mp.fsum(e) for v in e]
        others = [i not in y for i in range(len(x))]
        rest = mp.fsum(v for v, other in zip(q, others, strict=True) if other)
        shares = [[mp.mpf(int(i == j)) for i in range(len(x))] for j in y]
        shares.append([other * v / rest for v, other in zip(q, others, strict=True)])
        # 1 - q of a class with nearly all probability, as the sum of the others
        slopes = [
            [
                mp.fsum(q[i] for i in range(len(x)) if i != m) if s == 1 else s - v
                for m, (s, v) in enumerate(zip(of, q, strict=True))
            ]
            for of in shares
        ]
        values = [mp.log(q[j]) for j in y] + [mp.log(rest)]
        return np.array([float(v) for v in values]), np.array([[float(v) for v in of] for of in slopes])


EVERY = [(k, dtype, tail) for k in (1, 3, 20) for dtype in (np.float32, np.float64) for tail in (False, True)]
QUICK = (3, np.float32, True), (20, np.float32, False)
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]


@pytest.mark.parametrize(("k", "dtype", "tail"), CASES)
@pytest.mark.in_turn(4)
def test_accuracy(k, dtype, tail, platform, rng):
    """Relative errors are up to 6 ulps (5 in derivatives), plus the effect of half an ulp of x - max x on exp x."""
    y, x = rows(rng, 30, 30, k, dtype)
    with jax.enable_x64(dtype == np.float64):
        values, slopes = map(
            np.asarray,
            optimized_jit(
                lambda y, x: (
                    log_probs(y, x, tail=tail),
                    jax.vmap(jax.jacrev(functools.partial(log_probs, tail=tail), 1))(y, x),
                )
            )(y, x),
        )
    eps = np.finfo(dtype).eps
    for row, value, slope in zip(zip(y, x, strict=True), values, slopes, strict=True):
        expected, exact = (a[: k + tail] for a in truth(*row))
        span = np.ptp(row[1])
        seen = np.abs(exact) > 1e3 * np.finfo(dtype).tiny
        assert (np.abs(value - expected) <= (6 + span / 2) * eps * np.abs(expected)).all()
        assert (np.abs(slope - exact) <= (5 + span / 2) * eps * np.abs(exact))[seen].all()


def test_logits_that_are_rounded_differently():
    """If a program recomputes the labels' logits with another rounding, a log-probability near 0 stays accurate."""
    x, y, classes = jnp.array([[30.0, 0, 1], [20, -30, 3], [2, 2, -1]]), jnp.array([[0, 2]] * 3), Classes(-1)
    m, s = _sums(x, classes)
    with jax.enable_x64(True):
        expected = log_probs(np.asarray(y), np.asarray(x, np.float64))
    for error in (-3e-7, 3e-7):
        np.testing.assert_allclose(_log_probs(y, x * (1 + error), m, s, classes), expected, rtol=3e-6)


@with_tail
@pytest.mark.slow
def test_derivatives_equal_those_of_log_softmax(tail, rng):
    y, x = rows(rng, 4, 9, 3, np.float64)
    x = np.clip(x, -6, 6)

    def dense(x):
        log_q = jax.nn.log_softmax(x)
        at = jnp.take_along_axis(log_q, y, -1)
        listed = jnp.zeros_like(x).at[jnp.arange(4)[:, None], y].set(1)
        rest = jax.nn.logsumexp(jnp.where(listed == 1, -INF, log_q), -1, keepdims=True)
        return jnp.square(jnp.concatenate([at, rest], -1) if tail else at).sum()

    def ours(x):
        return jnp.square(log_probs(y, x, tail=tail)).sum()

    direction = (rng.standard_normal(x.shape),)
    with jax.enable_x64(True):
        got, expected = (
            jax.jit(lambda a, t, of=programs: {m: f(a, t) for m, f in of.items()})((x,), direction)
            for programs in (modes(f, (0,)) for f in (ours, dense))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, expected)


@pytest.mark.slow
def test_one_label_equals_minus_its_loss(rng):
    """One label is equal to the bit, along any axis. In lists of one or two labels it is equal up to rounding."""
    y, x = rng.integers(0, 7, (3, 5)), rng.standard_normal((3, 7, 5)).astype(np.float32)
    got = log_probs(y, x, axis=1)
    np.testing.assert_array_equal(got, -jce.cross_entropy_with_integer_labels(y, x, axis=1))
    several = log_probs(np.stack([y, y[::-1]], -1), x, axis=1)
    np.testing.assert_allclose(several[..., 0], got, rtol=1e-6)
    np.testing.assert_allclose(log_probs(y[..., None], x, axis=1, tail=True)[..., 0], got, rtol=1e-6)


@pytest.mark.holds_nan
@with_tail
@pytest.mark.slow
def test_a_label_outside_the_classes_makes_only_its_entry_nan(tail, rng):
    """The entry's value and derivative are NaN, but not results that mask it. Such a label adds nothing to a tail."""
    x = rng.standard_normal(5).astype(np.float32)
    y, others = np.array([2, 5, -1, 0]), np.array([0, 3] + [4] * tail)
    value, jacobian = jax.jit(
        lambda x: (log_probs(y, x, tail=tail), jax.jacrev(lambda x: log_probs(y, x, tail=tail))(x))
    )(x)
    expected = log_probs(y[[0, 3]], x, tail=tail)
    for got, wanted in ((value, expected), (jacobian, jax.jacrev(lambda x: log_probs(y[[0, 3]], x, tail=tail))(x))):
        np.testing.assert_allclose(got[others], wanted, rtol=1e-6)
        assert np.isnan(got[1:3]).any(-1).all()
    total = jax.grad(lambda x: jnp.where(np.isin(np.arange(4 + tail), others), log_probs(y, x, tail=tail), 0).sum())(x)
    np.testing.assert_allclose(total, jacobian[others].sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.holds_nan
def test_empty_rows_and_tails():
    x = jnp.array([[2.0, 0.0, -INF], [1.0, NAN, 0.0], [0.0, 1.0, 2.0]])
    y = jnp.array([[0, 1], [2, 9], [1, 1]])
    whole = log_probs(y[:1], x[:1], tail=True)
    assert whole[0, -1] == -INF  # the tail has only a class at -∞
    assert log_probs(jnp.array([2, 0, 1]), x[2], tail=True)[-1] == -INF  # the tail has no class
    kept = jnp.array([[True, True, True], [False] * 3, [True, True, False]])
    got = log_probs(y, x, tail=True, where=kept)
    np.testing.assert_array_equal(got[1], np.zeros(3))
    gradient = jax.grad(lambda x: log_probs(y, x, tail=True, where=kept)[1].sum())(x)
    np.testing.assert_array_equal(gradient, np.zeros_like(x))
    np.testing.assert_allclose(
        log_probs(y[2, :1], x[2], tail=True, where=kept[2]), np.log(np.array([np.e, 1]) / (1 + np.e)), rtol=1e-6
    )
    for tail in (False, True):
        assert np.isnan(log_probs(jnp.array([0, 2]), x[1], tail=tail)).all()
        assert log_probs(jnp.zeros((4, 2), int), jnp.zeros((4, 0)), tail=tail).shape == (4, 2 + tail)


KL_BAR = 0.25  # relative to the effect of rounding the logits: eps (1 + span) Σ|p - q|


@pytest.mark.slow
def test_divergences_of_top_k_classes_and_a_tail(platform, rng):
    """KL of the top-k classes and a tail, in both directions, and Jensen-Shannon: ≥ 0, 0 at equality, and accurate."""
    n, k = 40, 4
    z = np.repeat(3 * rng.standard_normal((8, n)), 6, 0)
    d = np.tile([0, 1e-5, 1e-3, 1e-1, 1, 1], 8)[:, None]
    top = np.argsort(-z, -1)[:, :k]
    listed = np.zeros(z.shape, bool)
    np.put_along_axis(listed, top, True, 1)
    z += np.where(listed, np.resize([0, 5, 20], len(z))[:, None], 0)  # tails of .3 to 1e-9
    x, z = (z + d * rng.standard_normal(z.shape)).astype(np.float32), z.astype(np.float32)

    def divergences(top, z, x):
        p, q = (log_probs(top, a, tail=True) for a in (z, x))
        kl, js = jce.kl_divergence_with_logits, jce.jensen_shannon_divergence_with_logits
        gradient = jax.grad(lambda x: kl(p, log_probs(top, x, tail=True)).sum())(x)
        return kl(p, q), kl(q, p), js(p, q), jnp.abs(jnp.exp(p) - jnp.exp(q)).sum(-1), gradient

    got = [np.asarray(a) for a in jax.jit(divergences)(top, z, x)]
    with jax.enable_x64(True):
        *expected, apart, slope = map(np.asarray, jax.jit(divergences)(top, np.float64(z), np.float64(x)))
    bound = np.finfo(np.float32).eps * (1 + np.ptp(z, -1)) * apart
    for g, e in zip(got[:3], expected, strict=True):
        assert (g >= 0).all()
        assert (g[d[:, 0] == 0] == 0).all()
        assert (np.abs(g - e) <= KL_BAR * bound + 1e-37).all(), np.max(np.abs(g - e) / bound)
    np.testing.assert_allclose(got[4], slope, rtol=1e-3, atol=1e-6)
    assert (got[4][d[:, 0] == 0] == 0).all()


@with_tail
@pytest.mark.parametrize("k", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_split_classes(tail, k, rng):
    """With axis_name, values and gradients equal those of whole rows."""
    y, x = rows(rng, 8, 24, k, np.float64)

    def split(x):
        return jax.shard_map(
            lambda y, x: log_probs(y, x, tail=tail, axis_name="classes"),
            mesh=make_mesh((2, 4)),
            in_specs=(P("tokens"), P("tokens", "classes")),
            out_specs=P("tokens"),
        )(y, x)

    def both(f):
        return jax.jit(lambda x: (f(x), jax.grad(lambda x: jnp.sin(f(x)).sum())(x)))(x)

    with jax.enable_x64(True):
        for got, expected in zip(both(split), both(lambda x: log_probs(y, x, tail=tail)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-300)


@pytest.mark.needs_jit
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA fused less into its reductions")
@pytest.mark.slow
def test_the_value_needs_no_array_of_all_classes():
    """There is no N × n array except, with a tail, the logits of the other classes."""
    shapes = jax.ShapeDtypeStruct((64, 20), np.int32), jax.ShapeDtypeStruct((64, 30_000), np.float32)
    for tail in (False, True):
        compiled = optimized_jit(lambda y, x, tail=tail: log_probs(y, x, tail=tail)).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < (tail + 0.1) * 4 * 64 * 30_000


def test_errors():
    x = np.zeros((4, 5), np.float32)
    for shape in ((4, 2, 1), (3, 2), (5, 4)):
        with pytest.raises(
            ValueError, match=r"log_probs_with_integer_labels: labels .*\(4,\), and then a last axis for k"
        ):
            log_probs(np.zeros(shape, int), x)
    with pytest.raises(
        ValueError, match=r"labels .*optional without a tail\); got labels: int\d\d\[4\].*labels\[\.\.\., N"
    ):
        log_probs(np.zeros(4, int), x, tail=True)
    with pytest.raises(
        ValueError, match=r"log_probs_with_integer_labels: labels .*\(4,\); got .*a last axis of length k"
    ):
        log_probs(np.zeros(3, int), x)
    with pytest.raises(
        TypeError, match=r"log_probs_with_integer_labels: labels must be integers.*labels: float32\[4,2\]"
    ):
        log_probs(np.zeros((4, 2), np.float32), x)
    with pytest.raises(TypeError, match=r"labels must be an array.*got labels: NoneType"):
        log_probs(None, x)
    with pytest.raises(TypeError, match=r"no argument 'ignore_index'.*where=\(labels != index\)"):
        log_probs(np.zeros(4, int), x, ignore_index=-100)
