"""Tests of labels with probabilities and of tails, against 300-bit formulas and dense targets, also for heads."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jce
from tests.kernels import modes
from tests.optimized_jit import optimized_jit
from tests.test_devices import make_mesh

INF, NAN = np.inf, np.nan
loss = jce.cross_entropy_with_integer_labels
with_tail = pytest.mark.parametrize("tail", [False, True], ids=["no tail", "tail"])


def truth(y, p, x, tail):
    """Value, gradient with respect to the logits, and the gradient's scale Σp q + p, all in 300 bits."""
    with mp.workprec(300):
        e = [mp.exp(mp.mpf(float(v))) for v in x]
        q, p = [v / mp.fsum(e) for v in e], [mp.mpf(float(v)) for v in p]
        target = [mp.fsum(pj for yj, pj in zip(y, p, strict=True) if yj == i) for i in range(len(x))]
        value, total = mp.fsum(-t * mp.log(v) for t, v in zip(target, q, strict=True)), mp.fsum(p)
        gradient = [v * total - t for t, v in zip(target, q, strict=True)]
        scale = [v * total + t for t, v in zip(target, q, strict=True)]
        if tail:
            others = [i not in y for i in range(len(x))]
            rest = mp.fsum(v for v, other in zip(q, others, strict=True) if other)
            value -= (1 - total) * mp.log(rest)
            gradient = [
                g + (1 - total) * (v - other * v / rest) for g, v, other in zip(gradient, q, others, strict=True)
            ]
            scale = [s + (1 - total) * (v + other * v / rest) for s, v, other in zip(scale, q, others, strict=True)]
        return float(value), *(np.array([float(v) for v in a]) for a in (gradient, scale))


def rows(rng, count, n, k, dtype):
    """Targets for k classes with a large or small sum, and logits, the first label's from far below to far above."""
    x = 3 * rng.standard_normal((count, n))
    y = np.stack([rng.choice(n, k, replace=False) for _ in range(count)])
    margins = np.resize([-20, 0, 5, 10, 20], count)
    x[np.arange(count), y[:, 0]] = x.max(1) + margins
    p = rng.dirichlet(np.ones(k), count) * np.resize([1 - 1e-5, 0.9, 0.3], (count, 1))
    return y, p.astype(dtype), x.astype(dtype)


EVERY = [(k, dtype, tail) for k in (1, 3, 20) for dtype in (np.float32, np.float64) for tail in (False, True)]
QUICK = (3, np.float32, True)
CASES = [case if case == QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]


@pytest.mark.parametrize(("k", "dtype", "tail"), CASES)
@pytest.mark.in_turn(2)
def test_accuracy(k, dtype, tail, platform, rng):
    """Errors are a few ulps, plus the effect of half an ulp of x - max x on its exponential."""
    y, p, x = rows(rng, 15, 30, k, dtype)
    with jax.enable_x64(dtype == np.float64):
        program = optimized_jit(jax.value_and_grad(lambda x: loss(y, x, label_probs=p, tail=tail).sum()))
        values = optimized_jit(lambda x: loss(y, x, label_probs=p, tail=tail))(x)
        values, gradients = map(np.asarray, (values, program(x)[1]))
    eps = np.finfo(dtype).eps
    for row, value, gradient in zip(zip(y, p, x, strict=True), values, gradients, strict=True):
        expected, slope, scale = truth(*row, tail)
        span = np.ptp(row[2])
        assert abs(value - expected) <= (6 + span / 2) * eps * expected, abs(value - expected) / eps / expected
        assert (np.abs(gradient - slope) <= (6 + span) * eps * scale).all(), (
            np.abs(gradient - slope) / eps / scale,
            span,
        )


@with_tail
@pytest.mark.slow
def test_derivatives_equal_those_of_dense_targets(tail, rng):
    y, p, x = rows(rng, 4, 9, 3, np.float64)
    y[0, 1] = y[0, 0]  # the probabilities of equal labels are added

    def dense(p, x):
        target = jnp.zeros_like(x).at[jnp.arange(4)[:, None], y].add(p)
        listed = jnp.zeros_like(x).at[jnp.arange(4)[:, None], y].set(1)
        log_q = jax.nn.log_softmax(x)
        losses = -(target * log_q).sum(-1)
        if tail:
            losses -= (1 - p.sum(-1)) * jax.nn.logsumexp(jnp.where(listed == 1, -INF, log_q), -1)
        return jnp.square(losses).sum()

    def ours(p, x):
        return jnp.square(loss(y, x, label_probs=p, tail=tail)).sum()

    directions = tuple(rng.standard_normal(a.shape) for a in (p, x))
    with jax.enable_x64(True):
        got, expected = (
            jax.jit(lambda a, t, of=programs: {m: f(a, t) for m, f in of.items()})((p, x), directions)
            for programs in (modes(f, (0, 1)) for f in (ours, dense))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, expected)


@pytest.mark.holds_nan
def test_edge_cases():
    x = jnp.array([2.0, 0.0, 1.0, -INF])

    @functools.partial(jax.jit, static_argnames="tail")
    def of_lists(y, p, tail):
        return jax.value_and_grad(lambda p, x: loss(y, x, label_probs=p, tail=tail), (0, 1))(p, x)

    def value_and_gradients(y, p, tail=False):
        """Pads the lists, so that one program serves all. Padding labels are outside [0, n)."""
        pad = 4 - len(y)
        y, p = np.array(y + [9, -1, -7][:pad]), np.float32(p + [0] * pad)
        return jax.tree.map(np.asarray, of_lists(y, p, tail))

    value, (in_p, in_x) = value_and_gradients([0, 7, -1], [0.5, 0, 0], tail=True)
    np.testing.assert_allclose(value, loss(jnp.array([0]), x, label_probs=jnp.array([0.5]), tail=True), rtol=1e-6)
    assert (in_p[1:] == 0).all()
    assert np.isfinite(in_x).all()
    value, (_, in_x) = value_and_gradients([0, 7], [0.5, 0.1])  # a padding label must have probability 0
    assert np.isnan(value)
    value, (_, in_x) = value_and_gradients([0, 3], [0.5, 0])  # an impossible class
    assert value == pytest.approx(float(0.5 * loss(0, x)), rel=1e-6)
    assert in_x[3] == 0
    assert value_and_gradients([0, 3], [0.5, 0.1])[0] == INF
    assert value_and_gradients([0, 1, 2], [0.2, 0.2, 0.2], tail=True)[0] == INF  # the tail has only an impossible class
    value, (_, in_x) = value_and_gradients([0, 1, 2, 3], [0.2, 0.3, 0.5, 0], tail=True)  # the tail has no class
    assert value == pytest.approx(
        float(loss(jnp.array([0, 1, 2]), x, label_probs=jnp.array([0.2, 0.3, 0.5]))), rel=1e-6
    )
    assert np.isfinite(in_x).all()
    assert loss(jnp.zeros((2, 0), int), jnp.ones((2, 3)), label_probs=jnp.ones((2, 0))).tolist() == [0, 0]
    assert loss(jnp.array([[0, 1]] * 2), jnp.ones((2, 0)), label_probs=jnp.full((2, 2), 0.5)).tolist() == [0, 0]
    pair, quarters = jnp.array([[0, 1]] * 3), jnp.full((3, 2), 0.25)  # with the 1 of 1 - Σp, an odd number of terms
    one = loss(pair[0], x, label_probs=quarters[0], tail=True)
    three = loss(pair, jnp.stack([x] * 3), label_probs=quarters, tail=True)
    np.testing.assert_allclose(three, [one] * 3, rtol=1e-6)
    where = jnp.array([[True] * 4, [False] * 4])
    two = loss(
        jnp.array([[[0, 1]] * 2]), jnp.stack([x, x])[None], label_probs=jnp.full((1, 2, 2), 0.5), where=where[None]
    )
    np.testing.assert_allclose(two, [[0.5 * (loss(0, x) + loss(1, x)), 0]], rtol=1e-6)


# Lists that hold every possible class: because of rounding, their 1 - Σp is slightly off 0


def complete_lists(rng, dtype, possible, n, rows=300):
    """All classes that a teacher considers possible, their probabilities, a student's logits, and the classes' mask."""
    logits = 3 * rng.standard_normal((rows, n)).astype(np.float32)
    p, y = jax.lax.top_k(jax.nn.softmax(jnp.where(np.arange(n) < possible, logits, -INF).astype(dtype)), possible)
    return y, p, 3 * rng.standard_normal((rows, n)).astype(np.float32), np.arange(n) < possible


WAYS_OF_EXCLUDING = {
    "where": lambda y, p, x, legal: loss(y, x, label_probs=p, tail=True, where=legal),
    "minus infinity": lambda y, p, x, legal: loss(y, jnp.where(legal, x, -INF), label_probs=p, tail=True),
    "bias": lambda y, p, x, legal: jce.linear_cross_entropy(
        y,
        x,
        np.eye(x.shape[1], dtype=np.float32),
        jnp.where(legal, 0, -INF),
        label_probs=p,
        tail=True,
        reduction="none",
    ),
    "only possible classes": lambda y, p, x, legal: loss(y, x[:, : legal.sum()], label_probs=p, tail=True),
}


DTYPES = np.float32, jnp.bfloat16, jnp.float16
EXCLUDED = [
    pytest.param(way, dtype, marks=[pytest.mark.slow] if (i + j) % 3 else [], id=f"{way}-{np.dtype(dtype)}")
    for i, way in enumerate(WAYS_OF_EXCLUDING)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("way", "dtype"), EXCLUDED)
@pytest.mark.slow
def test_an_empty_tail_has_no_effect(way, dtype, rng):
    """Value and gradients equal those without a tail, for 3 or 30 possible classes."""
    y, p, x, legal = complete_lists(rng, dtype, *((30, 40) if dtype == np.float32 else (3, 7)))

    def of(how, p, x):
        return how(y, p, x, legal).sum()

    def plain(y, p, x, legal):
        return loss(y, x, label_probs=p, where=legal)

    got, expected = (
        jax.jit(jax.value_and_grad(of, (1, 2)), static_argnums=0)(f, p, x) for f in (WAYS_OF_EXCLUDING[way], plain)
    )
    digits = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(got[1][0]), np.float32(expected[1][0]), rtol=4 * digits, atol=digits)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1][1], expected[1][1], atol=1e-6)


@pytest.mark.holds_nan
def test_a_tail_with_only_impossible_classes():
    """The loss is infinite, unless Σp is 1 up to rounding. A Σp slightly above 1 doesn't lower the loss."""
    x, y = jnp.array([0.0, 1.0, 2.0, -INF], np.float32), jnp.arange(3)

    def of(p, x=x, **options):
        return loss(y, x, label_probs=jnp.asarray(p), tail=True, **options)

    exact = jnp.array([0.5, 0.25, 0.25], np.float32)
    eps = np.finfo(np.float32).eps
    plain = loss(y, x, label_probs=exact)
    for ulps in (-4, -1, 1, 4):
        assert of(exact.at[0].add(ulps * eps)) == pytest.approx(float(plain), rel=1e-5)
    assert of(exact.at[0].add(-8 * eps)) == INF
    # A tail with no class at all contributes 0, however much probability the list leaves.
    assert of(exact / 2, where=np.arange(4) < 3) == pytest.approx(float(plain / 2), rel=1e-6)
    # With a possible class in the tail: the value, and the derivative with respect to p on both sides of Σp = 1.
    low = x.at[3].set(-50.0)
    for ulps, tail in ((-4, 4 * eps), (0, 0), (4, 0)):
        p = exact.at[0].add(ulps * eps)
        value, (in_p, in_x) = jax.value_and_grad(lambda p, x: of(p, x), (0, 1))(p, low)
        assert value - loss(y, low, label_probs=p) == pytest.approx(tail * 52.4, abs=1e-6)
        tail_of_q = -jax.nn.log_softmax(low)[3]
        np.testing.assert_allclose(in_p, -jax.nn.log_softmax(low)[:3] - tail_of_q, rtol=1e-5)
        assert np.isfinite(in_x).all()
    falling = [float(of(exact.at[0].add(3 * eps), x.at[3].set(-b))) for b in (10.0, 100.0, 1000.0)]
    assert falling[1] == falling[2] >= falling[0] - 1e-3
    assert of(1.1 * exact, low) < loss(y, low, label_probs=1.1 * exact)  # well above Σp = 1, the linear formula holds


@pytest.mark.holds_nan
@pytest.mark.parametrize("under", ["logits", "a head"])
@with_tail
@pytest.mark.in_turn(2, "wide")
def test_a_label_outside_the_classes_makes_derivatives_nan(under, tail):
    """Only rows with such a label are NaN, and only if its probability isn't 0. For masked rows, derivatives are 0."""
    y = jnp.array([[0, 9], [0, -1], [9, 0], [1, 2]])
    p = jnp.array([[0.5, 0.25], [0.5, 0.0], [0.75, 0.0], [0.5, 0.25]])
    x = jnp.array([[0.0, 1.0, 2.0]] * 4)

    def each(p, x):
        if under == "logits":
            return loss(y, x, label_probs=p, tail=tail, label_smoothing=0.1)
        return jce.linear_cross_entropy(y, x, jnp.eye(3), label_probs=p, tail=tail, reduction="none", chunk_size=3)

    wrong = np.array([True, False, True, False])
    assert (np.isnan(each(p, x)) == wrong).all()
    rows = np.arange(4)
    for mode in (jax.jacfwd, jax.jacrev):
        for jacobian in jax.jit(mode(each, (0, 1)))(p, x):
            of_row = np.asarray(jacobian)[rows, rows]
            assert (np.isnan(of_row) == wrong[:, None]).all()
            assert not np.asarray(jacobian).sum(1, where=rows[:, None] != rows[:, None, None]).any()
    dropped = jax.jit(jax.grad(lambda p, x: jnp.where(wrong, 0, each(p, x)).sum(), (0, 1)))(p, x)
    assert all(np.isfinite(g).all() and not g[wrong].any() for g in dropped)


@pytest.mark.holds_nan
def test_a_weight_of_0_masks_a_label_outside_the_classes():
    y, p, x = jnp.array([[0, 9], [0, 1]]), jnp.full((2, 2), 0.5), jnp.ones((2, 3))

    def total(weights, x):
        return jce.linear_cross_entropy(y, x, jnp.eye(3), label_probs=p, weights=weights, reduction="sum")

    value, gradients = jax.value_and_grad(total, (0, 1))(jnp.array([0.0, 1.0]), x)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [0, np.log(3)], rtol=1e-6)
    assert np.isfinite(gradients[1]).all()


@with_tail
@pytest.mark.in_turn(2, "wide")
def test_no_tokens_no_labels_and_an_impossible_class(tail):
    def of_head(tokens, k, **options):
        y, p = jnp.zeros((*tokens, k), int), jnp.ones((*tokens, k))
        h, w = jnp.ones((*tokens, 4)), jnp.ones((5, 4))
        return jce.linear_cross_entropy(y, h, w, label_probs=p, tail=tail, **options)

    assert of_head((0,), 2) == 0
    assert of_head((2, 0), 2, reduction="none").shape == (2, 0)
    assert (of_head((3,), 0, reduction="none") == 0).all()  # all classes are in the tail, whose probability is 1
    assert (loss(jnp.zeros((2, 0), int), jnp.ones((2, 4)), label_probs=jnp.ones((2, 0)), tail=tail) == 0).all()
    x, y, p = jnp.array([0.0, 1.0, -INF, 2.0]), jnp.array([0, 1]), jnp.array([0.5, 0.25])
    with jax.debug_nans(True):
        for position in (0, 1):
            assert np.isfinite(jax.grad(lambda p, x: loss(y, x, label_probs=p, tail=tail), position)(p, x)).all()


def test_more_labels_than_classes(rng):
    """A padded list with repeated labels gives the same loss as the dense target."""
    y = np.array([[0, 2, 0, 1, 2, 7, -1]] * 2)
    p = np.float32([[0.1, 0.2, 0.1, 0.25, 0.05, 0, 0]] * 2)
    x = rng.standard_normal((2, 4)).astype(np.float32)
    dense = np.array([[0.2, 0.25, 0.25, 0]] * 2, np.float32)
    np.testing.assert_allclose(loss(y, x, label_probs=p), jce.cross_entropy_with_logits(dense, x), rtol=1e-6)
    tail = loss(y, x, label_probs=p, tail=True)
    np.testing.assert_allclose(tail, jce.cross_entropy_with_logits(dense + np.float32([0, 0, 0, 0.3]), x), rtol=1e-5)


@with_tail
@pytest.mark.in_turn(2)
def test_along_any_axis_with_smoothing(tail, rng):
    """Smoothing spreads only the listed probabilities, and only over the kept classes."""
    y, p, x = rows(rng, 4, 9, 3, np.float32)
    kept = np.arange(9) < 7
    y %= 7
    target = np.zeros_like(x)
    np.add.at(target, (np.arange(4)[:, None], y), p)
    smoothed = 0.9 * target + 0.1 * p.sum(1, keepdims=True) * kept / 7
    got = loss(y, x.T, label_probs=p, label_smoothing=0.1, axis=0, where=kept[:, None], tail=tail)
    expected = jce.cross_entropy_with_logits(smoothed, x, where=kept)
    if tail:
        plain = loss(y, x, label_probs=p, where=kept), loss(y, x, label_probs=p, where=kept, tail=True)
        expected += plain[1] - plain[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_one_row_alone(rng):
    """A smoothed loss without a batch axis has the same gradients as in a batch."""
    x, y, p = np.float32(rng.standard_normal(7)), rng.permutation(7)[:2], np.float32([0.5, 0.3])
    loss = functools.partial(jce.cross_entropy_with_integer_labels, label_smoothing=0.1)
    alone = jax.grad(lambda x, p: loss(y, x, label_probs=p), (0, 1))
    got, batch = alone(x, p), jax.grad(lambda x, p: loss(y[None], x, label_probs=p).sum(), (0, 1))(x[None], p[None])
    for a, b in zip(got, batch, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-6)


def test_dtypes():
    """The result is float64 if any argument is float64."""
    y = np.zeros((4, 2), int)
    functions = {
        ((4, 2), (4, 5)): lambda p, x: loss(y, x, label_probs=p),
        ((4, 2), (4, 3), (5, 3)): lambda p, h, w: jce.linear_cross_entropy(y, h, w, label_probs=p),
    }
    with jax.enable_x64(True):
        for shapes, f in functions.items():
            for wide in range(-1, len(shapes)):
                dtypes = [np.float64 if i == wide else np.float32 for i in range(len(shapes))]
                result = jax.eval_shape(f, *map(jax.ShapeDtypeStruct, shapes, dtypes))
                assert result.dtype == (np.float32 if wide < 0 else np.float64), (shapes, wide)


@pytest.mark.needs_jit
def test_few_labels_are_scattered_only_on_a_cpu():
    arguments = np.zeros((4, 3), int), np.ones((4, 3), np.float32), np.ones((4, 9), np.float32)
    traced = jax.jit(lambda y, p, x: loss(y, x, label_probs=p)).trace(*arguments)
    for platform in ("cpu", "cuda", "tpu"):
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.scatter" in lowered) == (platform == "cpu")


@pytest.mark.needs_jit
def test_number_of_matmuls():
    from tests.test_linear_cost import products

    def f(h, w):
        y, p = np.zeros((64, 3), int), np.full((64, 3), 0.25, np.float32)
        return jce.linear_cross_entropy(y, h, w, label_probs=p, tail=True, chunk_size=16)

    a = jax.ShapeDtypeStruct((64, 8), np.float32), jax.ShapeDtypeStruct((40, 8), np.float32)
    assert products(f, *a) == 1
    assert products(jax.value_and_grad(f, (0, 1)), *a) == 3


@pytest.mark.needs_jit
@with_tail
@pytest.mark.slow
def test_split_classes(tail, rng):
    """Results equal those on one device, with axis_name and for a head on a mesh."""
    y, p, x = rows(rng, 8, 24, 3, np.float32)
    mesh = make_mesh((2, 4))

    def split(x):
        return jax.shard_map(
            lambda y, p, x: loss(y, x, label_probs=p, tail=tail, axis_name="classes"),
            mesh=mesh,
            in_specs=(P("tokens"), P("tokens"), P("tokens", "classes")),
            out_specs=P("tokens"),
        )(y, p, x).sum()

    def whole(x):
        return loss(y, x, label_probs=p, tail=tail).sum()

    for f, g in ((split, whole), (jax.grad(split), jax.grad(whole))):
        np.testing.assert_allclose(jax.jit(f)(x), g(x), rtol=1e-5, atol=1e-6)
    h, w = (rng.standard_normal(s).astype(np.float32) for s in ((8, 4), (24, 4)))
    on = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="tokens", class_axis="classes")
    got, expected = (
        jax.value_and_grad(lambda h, w, f=f: f(y, h, w, label_probs=p, tail=tail, chunk_size=2), (0, 1))(h, w)
        for f in (on, jce.linear_cross_entropy)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_errors():
    y, p, x = np.zeros((4, 2), int), np.zeros((4, 2), np.float32), np.zeros((4, 5), np.float32)
    h, w = np.zeros((4, 3), np.float32), np.zeros((5, 3), np.float32)
    for f, rest in ((loss, (x,)), (jce.linear_cross_entropy, (h, w))):
        with pytest.raises(ValueError, match=rf"{f.__name__}: tail must come with label_probs.*tail=True alone"):
            f(y[:, 0], *rest, tail=True)
        with pytest.raises(ValueError, match=rf"{f.__name__}: labels .*label_probs.*\[4\]"):
            f(y, *rest, label_probs=p[:, 0])
    with pytest.raises(ValueError, match=r"labels: int.*\[\], label_probs: float32\[\]"):
        loss(1, x[0], label_probs=np.float32(0.5))
    with pytest.raises(TypeError, match=r"labels must be integers"):
        loss(p, x, label_probs=p)
    with pytest.raises(TypeError, match=r"linear_cross_entropy: labels must be integers.*labels: float32\[4,2\]"):
        jce.linear_cross_entropy(p, h, w, label_probs=p)
    for shape in ((4, 4, 2), (4, 1, 2), (4, 2, 1), (4,), (3, 2)):
        with pytest.raises(
            ValueError, match=r"linear_cross_entropy: labels and label_probs must both.*\(4,\) \+ \(k,\)"
        ):
            jce.linear_cross_entropy(np.zeros(shape, int), h, w, label_probs=np.zeros(shape, np.float32))
