"""The accelerator's version of heads and row sums, run on a CPU, and the program that each platform lowers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jce
from jce._heads.loop.chunk_rule import RULES
from jce._jax import platforms as _platforms
from jce._softmax.chain import Chain
from jce._softmax.reduction import MaskedReduction, Reduction
from jce._softmax.softmax import surprisal_at_label
from tests import test_accuracy
from tests import test_corners as corners
from tests.kernels import OF_LOGITS, WITH_CLASSES, each_of_logits, easy, label, modes, total
from tests.optimized_jit import optimized_jit
from tests.test_known_label import OFFSETS, rows

pytestmark = pytest.mark.needs_jit

TOKENS, WIDTH, CLASSES = 61, 16, 40
REDUCTION = Reduction(-1)


@pytest.fixture
def accelerator(monkeypatch):
    """Makes a CPU lower the accelerator's program, in chunks of 16 tokens."""
    monkeypatch.setattr(_platforms, "CPU", _platforms.TPU)
    monkeypatch.setitem(RULES, "tpu", RULES["tpu"]._replace(chunk_bytes=0, least_tokens=16))
    jax.clear_caches()
    yield
    jax.clear_caches()


def arguments(rng, dtype=np.float32, confident=False):
    w = rng.standard_normal((CLASSES, WIDTH))
    y = rng.integers(0, CLASSES, TOKENS)
    h = rng.standard_normal((TOKENS, WIDTH)) + (2 * w[y] if confident else 0)
    return jnp.asarray(y, jnp.int32), jnp.asarray(h, dtype), jnp.asarray(w, dtype)


@pytest.mark.slow
def test_confident_losses_stay_accurate(accelerator, rng):
    """In float32, a loss of 1e-30 is computed as 1e-30, whichever class is the largest."""
    x = np.zeros((64, 5), np.float32)
    x[np.arange(64), np.arange(64) % 5] = np.linspace(-80, 80, 64)
    y = np.asarray(np.arange(64) // 5 % 5, np.int32)
    value, gradient = jax.value_and_grad(lambda x: jce.linear_cross_entropy(y, x, jnp.eye(5), reduction="sum"))(x)
    with jax.enable_x64(True):
        expected, expected_gradient = jax.value_and_grad(lambda x: jce.cross_entropy_with_integer_labels(y, x).sum())(
            np.float64(x)
        )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-37)


ALONE = [
    {},
    {"z_loss": 0.1},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "z_loss": 0.1},
    {"logit_soft_cap": 1e3, "z_loss": 0.1},
]


@pytest.mark.parametrize(
    ("options", "split"),
    [*((options, False) for options in ALONE), (ALONE[-2], True)],
    ids=lambda o: ("split" if o else "alone") if isinstance(o, bool) else " ".join(o) or "plain",
)
@pytest.mark.slow
def test_heads_at_every_offset(accelerator, rng, options, split):
    """The shift is chosen before the logits are known, so some tokens need a second pass over their logits."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    on = {"mesh": mesh, "token_axis": "data", "class_axis": "model"}
    of_head = jce.on_mesh(jce.linear_cross_entropy, **on) if split else jce.linear_cross_entropy
    places = itertools.product(OFFSETS, (-110, -80, -40, -20, -5, 0, 5, 20, 50, 80, 110))
    y, x = map(np.concatenate, zip(*(rows(rng, 40, *place, count=2) for place in places), strict=True))
    y, ones = y.astype(np.int32), np.ones(len(y), x.dtype)
    cap, penalty, smoothing = (
        options.get("logit_soft_cap"),
        options.get("z_loss", 0.0),
        options.get("label_smoothing", 0),
    )

    def total(x, weights):  # its derivatives with respect to weights are the losses
        return of_head(y, x, jnp.eye(40), weights=weights, reduction="sum", **options)

    def dense(x):
        x = x if cap is None else cap * jnp.tanh(x / cap)
        return jce.cross_entropy_with_integer_labels(y, x, z_loss=penalty, label_smoothing=smoothing)

    @optimized_jit
    def alone(x):  # losses without a gradient, so nothing else is stored
        return of_head(y, x, jnp.eye(40, dtype=x.dtype), reduction="none", **options)

    gradients, values = optimized_jit(jax.grad(total, (0, 1)))(x, ones)
    narrow = jnp.asarray(x, jnp.bfloat16)
    with jax.enable_x64(True):
        both = optimized_jit(lambda x: (dense(x), jax.grad(lambda x: dense(x).sum())(x)))
        expected, expected_gradients = map(np.asarray, both(np.float64(x)))
        of_narrow = optimized_jit(dense)(np.float64(narrow))
    tolerance = {"rtol": 2e-5 if cap is None else 3e-4, "atol": 1e-37}
    np.testing.assert_allclose(values, expected, **tolerance)
    np.testing.assert_allclose(alone(narrow), of_narrow, **tolerance)
    # If z-loss and label terms cancel, the difference has the rounding errors of both.
    largest = np.maximum(np.abs(expected_gradients), 2 * penalty * np.abs(x)).max(-1, keepdims=True)
    unlike = np.abs(np.float64(gradients) - expected_gradients) / np.maximum(largest, 1e-30)
    assert unlike.max() < (2e-5 if cap is None else 3e-4)


@pytest.mark.holds_nan
@pytest.mark.parametrize("case", ["no such label", "all forbidden", "label forbidden", "a nan"])
@pytest.mark.in_turn(4)
def test_edge_cases(accelerator, case):
    """As on a CPU, the loss of the invalid token is NaN or +∞, and other losses don't change."""
    y, x = np.zeros(20, np.int32), np.tile(np.float32([1, 2, 3]), (20, 1))
    y[3] = 3 if case == "no such label" else 0
    if case == "all forbidden":
        x[3] = -np.inf
    elif case == "label forbidden":
        x[3, 0] = -np.inf
    elif case == "a nan":
        x[3, 1] = np.nan
    bad = np.inf if case == "label forbidden" else np.nan
    each = jce.cross_entropy_with_integer_labels(y, x)
    # A bias can't give each token its own logits, so each call has one token, and the bias is that token's logits.
    for token in (2, 3):
        loss = jce.linear_cross_entropy(y[token : token + 1], jnp.zeros((1, 1)), jnp.zeros((3, 1)), x[token])
        np.testing.assert_allclose(loss, each[token], rtol=1e-6)
    np.testing.assert_equal(np.asarray(each[3]), np.float32(bad))


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=lambda o: " ".join(o) or "plain"
)
@pytest.mark.slow
def test_tokens_and_classes_on_several_devices(accelerator, rng, options):
    y, h, w = arguments(rng)
    y, h = y[:60], h[:60]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    on = {"mesh": mesh, "token_axis": "data", "class_axis": "model"}
    sharded, alone = (
        jax.value_and_grad(lambda h, w, f=f: f(y, h, w, **options), (0, 1))
        for f in (jce.on_mesh(jce.linear_cross_entropy, **on), jce.linear_cross_entropy)
    )
    close(optimized_jit(sharded)(h, w), alone(h, w))


@pytest.mark.slow
def test_log_probs_of_classes_on_several_devices(accelerator, rng):
    """The entropy's sums also run over all devices. One device has only forbidden classes."""
    with jax.enable_x64(True):
        y, h, w = arguments(rng, np.float64)
        bias = jnp.where(jnp.arange(CLASSES) < CLASSES // 4, -jnp.inf, 0.0)
        y = jnp.maximum(y, CLASSES // 4)
        mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = P(), P("model"), P("model")

        def log_probs(h, w, bias, axis_name=None):
            return tuple(jce.linear_log_probs(y, h, w, bias, axis_name=axis_name))

        split = jax.shard_map(functools.partial(log_probs, axis_name="model"), mesh=mesh, in_specs=specs, out_specs=P())

        def scalar(f):
            return lambda h, w: sum(jnp.sin(x).sum() for x in f(h, w, bias))

        got, expected = (optimized_jit(jax.value_and_grad(scalar(f), (0, 1)))(h, w) for f in (split, log_probs))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-11)


def close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none", "log_prob"])
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.slow
def test_bfloat16_matmuls_are_as_accurate_as_the_dense_loss(accelerator, confident, reduction):
    """Gradients against float64 and against optax, if XLA rounds wherever the program says so.

    Before its rounding to bfloat16, the derivative with respect to logits is scaled: its entry at the label becomes -1.
    """

    def ours(h, w):
        if reduction == "log_prob":
            return -jce.linear_log_probs(y, h, w).log_prob.mean()
        return jce.linear_cross_entropy(y, h, w, reduction=reduction).mean()

    rng = np.random.default_rng(5)
    n, d, tokens = 2000, 128, 512
    w = rng.standard_normal((n, d)) / np.sqrt(d)
    y = jnp.asarray(rng.integers(0, n, tokens), jnp.int32)
    h = 2 * rng.standard_normal((tokens, d)) + (1.5 * np.sqrt(d) * w[y] if confident else 0)
    h, w = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)

    def errors(loss, exactly):
        program = optimized_jit(jax.value_and_grad(loss, (0, 1))).lower(h, w)
        _, gradient = program.compile(compiler_options={"xla_allow_excess_precision": False})(h, w)
        return [np.linalg.norm(np.float64(g) - e) / np.linalg.norm(e) for g, e in zip(gradient, exactly, strict=True)]

    def peer(h, w):
        return optax.softmax_cross_entropy_with_integer_labels(h @ w.T, y).mean()

    with jax.enable_x64(True):
        dense = lambda h, w: jce.cross_entropy_with_integer_labels(y, h @ w.T).mean()  # noqa: E731
        exactly = [np.asarray(g) for g in jax.grad(dense, (0, 1))(np.float64(h), np.float64(w))]
    got, theirs = errors(ours, exactly), errors(peer, exactly)
    assert all(a <= 1.03 * b for a, b in zip(got, theirs, strict=True)), (got, theirs)
    assert max(got) < (2.4e-3 if confident else 1.9e-3)


@pytest.mark.slow
def test_a_derivative_that_is_0_for_dense_logits(accelerator):
    """At a margin of 40, all derivatives of dense bfloat16 logits are 0. The derivatives of the head are right."""
    h, w, y = jnp.full((16, 1), 40, jnp.bfloat16), jnp.asarray([[1], [0], [0]], jnp.bfloat16), jnp.zeros(16, jnp.int32)
    dense = jax.grad(lambda h: optax.softmax_cross_entropy_with_integer_labels(h @ w.T, y).sum())(h)
    ours = jax.grad(lambda h: jce.linear_cross_entropy(y, h, w, reduction="sum"))(h)
    assert not dense.any()
    np.testing.assert_allclose(np.float32(ours), -2 * np.exp(-40.0), rtol=1e-2)


def test_precision_keeps_float32(accelerator):
    """If `precision` is passed, the matmuls take derivatives in float32."""
    y, h, w = arguments(np.random.default_rng(0), jnp.bfloat16)

    def types(**options):
        program = jax.jit(jax.grad(lambda h: jce.linear_cross_entropy(y, h, w, **options))).lower(h).as_text()
        return [line for line in program.splitlines() if "dot_general" in line]

    assert all(line.count("xbf16>") == 2 for line in types())
    for precision in ("default", "highest"):
        assert any("xf32>, tensor" in line for line in types(precision=precision))


@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_log_probs"])
@pytest.mark.slow
def test_each_platform_has_its_own_chunk_size(function, rng):
    """An accelerator's program has larger chunks than a CPU's. An export for all platforms contains both programs."""
    tokens, n = 8192, 100_000
    shapes = [((tokens,), jnp.int32), ((tokens, 2), jnp.float32), ((n, 2), jnp.float32)]
    y, h, w = (jax.ShapeDtypeStruct(*s) for s in shapes)

    def loss(h, w, y):
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, getattr(jce, function)(y, h, w)))

    program = jax.jit(jax.value_and_grad(loss, (0, 1)))

    def text(*platforms):
        return jax.export.export(program, platforms=platforms)(h, w, y).mlir_module()

    small, large = f"tensor<512x{n}xf32>", f"tensor<2048x{n}xf32>"
    for platforms, there, not_there in (
        (("cpu",), [small], [large]),
        (("cuda",), [large], [small]),
        (("tpu",), [large], [small]),
        (("cpu", "cuda", "tpu"), [small, large], []),
    ):
        program_text = text(*platforms)
        assert all(s in program_text for s in there), platforms
        assert not any(s in program_text for s in not_there), platforms


LONGEST = ("jensen_shannon_divergence_with_logits", "kl_divergence_with_logits")
ON_DEVICES = [  # all kernels except the slowest, each on one platform; CI tests all with --as-on
    pytest.param(kernel, ["TPU", "GPU"][i % 2], id=label(kernel))
    for i, kernel in enumerate(
        kernel for kernel in WITH_CLASSES if kernel in OF_LOGITS or kernel.name == "kl_divergence"
    )
    if kernel.name not in LONGEST
]


@pytest.mark.parametrize(("kernel", "device"), ON_DEVICES)
@pytest.mark.in_turn(9)
def test_rows_are_as_accurate_as_on_a_cpu(kernel, device, monkeypatch):
    """Accuracy with the same error bounds as on a CPU, and all edge cases. `--as-on` runs the other laws."""
    monkeypatch.setattr(_platforms, "CPU", getattr(_platforms, device))
    jax.clear_caches()
    test_accuracy.test_values(kernel, (6, 33), np.float32, np.random.default_rng(2026))
    test_accuracy.test_first_derivatives(kernel, np.float32, np.random.default_rng(2026))
    test_accuracy.test_hessian_vector_products(kernel, np.float32, np.random.default_rng(2026))
    corners.test_value_and_gradient(kernel, np.float32)
    jax.clear_caches()


@each_of_logits
@pytest.mark.in_turn(5, "wide")
def test_a_gradient_alone_can_be_lowered(kernel):
    """XLA also receives unused results, such as the value. XLA crashes if a call in the reduction computes one."""
    gradient = optimized_jit(jax.grad(total(kernel), tuple(range(len(kernel.arguments)))))
    traced = gradient.trace(*easy(kernel, np.random.default_rng(0), (6, 33)))
    for platform in ("cpu", "cuda", "tpu"):
        assert "ENTRY" in traced.lower(lowering_platforms=(platform,)).compiler_ir("hlo").as_hlo_text()


def test_each_platform_sums_rows_in_its_own_way():
    """Long rows are folded on a CPU. One reduction has three results on a TPU, and on a GPU if the rows are long."""

    def text(rows, classes, *platforms):
        x = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
        return jax.export.export(jax.jit(jce.entropy_with_logits), platforms=platforms)(x).mlir_module()

    def has(text, *parts):
        return [part in text for part in parts]

    folded, reduction = "tensor<8x160x625xf32>", ":3 = stablehlo.reduce("
    for classes, platform, expected in (
        (100_000, "cpu", [True, False]),
        (100_000, "cuda", [False, True]),
        (100_000, "tpu", [False, True]),
        (1000, "cuda", [False, False]),
        (1000, "tpu", [False, True]),
    ):
        assert has(text(8, classes, platform), folded, reduction) == expected, (classes, platform)
    assert has(text(8, 100_000, "cpu", "cuda", "tpu"), folded, reduction) == [True, True]


@pytest.mark.slow
def test_log_probs(accelerator, rng):
    with jax.enable_x64(True):
        y, h, w = arguments(rng, np.float64)

        def ours(h, w):
            a, b = jce.linear_log_probs(y, h, w)
            return (a * a + b * b).sum()

        def whole(h, w):
            x = h @ w.T
            return (jce.cross_entropy_with_integer_labels(y, x) ** 2 + jce.entropy_with_logits(x) ** 2).sum()

        for f in (lambda f: f, lambda f: jax.grad(f, (0, 1)), lambda f: lambda *a: jax.jvp(jax.grad(f, (0, 1)), a, a)):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), f(ours)(h, w), f(whole)(h, w)
            )


@pytest.mark.slow
def test_explicit_meshes(accelerator, rng):
    """Tokens and classes are split as the types of the arrays say."""
    y, h, w = arguments(rng)
    y, h = y[:60], h[:60]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    expected = jax.value_and_grad(lambda h, w: jce.linear_cross_entropy(y, h, w), (0, 1))(h, w)
    with jax.set_mesh(mesh):
        put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
        y_, h_, w_ = put(y, "data"), put(h, "data"), put(w, "model")
        got = optimized_jit(jax.value_and_grad(lambda h, w: jce.linear_cross_entropy(y_, h, w), (0, 1)))(h_, w_)
    close(got, expected)


OF_HEADS = {
    "mean": lambda on, axis, y, h, w: on(jce.linear_cross_entropy)(y, h, w),
    "none": lambda on, axis, y, h, w: on(jce.linear_cross_entropy)(y, h, w, reduction="none"),
    "log-probabilities": lambda on, axis, y, h, w: sum(on(jce.linear_log_probs)(y, h, w)),
    "map": lambda on, axis, y, h, w: on(jce.linear_map)(
        functools.partial(jce.cross_entropy_with_integer_labels, axis_name=axis), y, jce.Linear(h, w), reduction="mean"
    ),
}


def test_gradients_of_bfloat16(accelerator, rng):
    y, *numbers = arguments(rng, jnp.bfloat16)

    @optimized_jit
    def gradients(h, w):
        return [
            jax.grad(lambda h, w, name=name: jnp.sum(OF_HEADS[name](lambda f: f, None, y, h, w)), (0, 1))(h, w)
            for name in ("log-probabilities", "map")
        ]

    with jax.enable_x64(True):
        exactly = jax.tree.map(np.asarray, gradients(*jax.tree.map(np.float64, numbers)))
    for got, expected in zip(jax.tree.leaves(gradients(*numbers)), jax.tree.leaves(exactly), strict=True):
        assert np.linalg.norm(np.float64(got) - expected) <= 2**-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.slow
@pytest.mark.long
def test_hessian_vector_products_of_bfloat16(accelerator, rng, name):
    """Derivatives up to order 3, also of batched heads and on a mesh, equal those in float64 up to rounding."""
    y, *numbers = arguments(rng, jnp.bfloat16)
    y, numbers = y[:60], (numbers[0][:60], numbers[1])
    directions = tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in numbers)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def alone(h, w):
        return OF_HEADS[name](lambda f: f, None, y, h, w)

    def sharded(h, w):
        on = functools.partial(jce.on_mesh, mesh=mesh, token_axis="data", class_axis="model")
        return OF_HEADS[name](on, "model", y, h, w)

    def batched(h, w):
        return jax.vmap(lambda w: alone(h, w))(w[None])[0]

    def derivatives(loss, a, t):
        programs = modes(lambda *a: jnp.square(loss(*a)).mean(), (0, 1))
        names = ("gradient", "forward over reverse", "reverse over forward", "reverse over reverse", "third order")
        return [programs[name](a, t) for name in names]

    program = optimized_jit(derivatives, static_argnums=0)
    with jax.enable_x64(True):
        exactly = jax.tree.map(np.asarray, program(alone, *jax.tree.map(np.float64, (numbers, directions))))
    for loss in (alone, sharded, batched):
        for got, expected in zip(
            jax.tree.leaves(program(loss, numbers, directions)), jax.tree.leaves(exactly), strict=True
        ):
            assert np.linalg.norm(np.float64(got) - expected) <= 1e-2 * np.linalg.norm(expected)


ROWS = {
    "one class": [3.0],
    "a tie": [1.0, 1, 0, -2, 1],
    "nearly one": [5.0, 5 - 2**-20, 5 - 2**-19],
    "a class dominates": [80.0, 0, 1, -3],
    "forbidden classes": [-np.inf, 2, 2.5, -np.inf],
    "the lowest numbers": [np.finfo(np.float32).min] * 3,
    "far apart": [1e30, -1e30, 0, -np.inf],
}


@pytest.mark.parametrize("backend", [REDUCTION, Chain(-1)], ids=lambda backend: type(backend).__name__)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_sums_in_one_pass(row, backend):
    """m is exact. The sums over all classes except one maximum are accurate to a few ulps, in any order of classes."""
    x = np.array([np.roll(row, k) for k in range(len(row))], np.float32)
    m, s, t = optimized_jit(backend.sums)(x)
    below = np.sort(np.float64(x[0]))[::-1]
    depth = np.minimum(below[0] - below[1:], 1e4)
    np.testing.assert_array_equal(m, np.float32(below[0]))
    np.testing.assert_allclose(s, np.full(len(row), np.exp(-depth).sum()), rtol=1e-6)
    np.testing.assert_allclose(t, np.full(len(row), (np.exp(-depth) * depth).sum()), rtol=1e-6)


def test_sums_in_one_pass_over_devices(accelerator, rng):
    """The entropy, to which t contributes most, with four classes per device."""
    x = (3 * rng.standard_normal((6, 16))).astype(np.float32)
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    entropy = functools.partial(jce.entropy_with_logits, axis_name="classes")
    split = jax.shard_map(entropy, mesh=mesh, in_specs=P(None, "classes"), out_specs=P())
    np.testing.assert_allclose(optimized_jit(split)(x), jce.entropy_with_logits(x), rtol=1e-6)


def test_derivatives_of_sums_if_one_device_has_only_forbidden_classes():
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x = np.float32([0, 1, -np.inf, -np.inf])

    def derivative(backend, x):
        return jax.jvp(lambda x: backend.sums(x)[1:], (x,), (jnp.arange(4.0)[: x.size] + 1,))[1]

    split = jax.shard_map(
        functools.partial(derivative, Reduction(-1, "classes")), mesh=mesh, in_specs=P("classes"), out_specs=P()
    )
    np.testing.assert_allclose(optimized_jit(split)(x), derivative(REDUCTION, x[:2]), rtol=1e-6)


@pytest.mark.holds_nan
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sums_of_invalid_rows(bad):
    row = np.float32([bad] * 5 if bad == -np.inf else [0, 1, bad, 2, bad])
    assert np.isnan(REDUCTION.sums(jnp.asarray(row)).s)


@pytest.mark.parametrize("top", [80.0, -80.0])
def test_a_confident_head_with_a_large_z_loss(accelerator, top):
    """The derivative at the label is much larger than the sum of the others, and can have either sign."""
    x, y = np.float32([[top, top - 200, top - 200], [top, top - 1, top - 2]]), np.array([0, 0])
    loss = functools.partial(jce.linear_cross_entropy, y, z_loss=1.0, reduction="sum")
    got = optimized_jit(jax.grad(lambda x, w: loss(x, w), (0, 1)))(x, jnp.eye(3))
    q = np.exp(np.float64(x) - x.max(1, keepdims=True))
    log_z = x.max(1) + np.log(q.sum(1))
    q /= q.sum(1, keepdims=True)
    dense = q * (1 + 2 * log_z[:, None]) - np.eye(3)[y]
    np.testing.assert_allclose(got[0], dense, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(got[1], dense.T @ x, rtol=1e-4)


@pytest.mark.holds_nan
def test_an_unused_loss_with_nan_logits_adds_nothing_to_the_gradient(accelerator, rng):
    y, h, w = arguments(rng)

    def total(w, h):
        losses = jce.linear_cross_entropy(y, h, w, reduction="none")
        return jnp.where(jnp.arange(TOKENS) == 3, 0, losses).sum()

    gradient = optimized_jit(jax.grad(total))
    np.testing.assert_allclose(gradient(w, h.at[3].set(3e38)), gradient(w, h), rtol=1e-5, atol=1e-5)


@pytest.mark.holds_nan
@pytest.mark.parametrize(
    "backend", [REDUCTION, MaskedReduction(-1), Chain(-1)], ids=lambda backend: type(backend).__name__
)
def test_a_row_of_forbidden_classes_has_no_mass(backend):
    m, z = backend.max_and_sum(jnp.full((2, 3), -jnp.inf))
    np.testing.assert_array_equal(m, [-np.inf, -np.inf])
    np.testing.assert_array_equal(z, [0, 0])


def test_labels_by_a_mask_or_a_gather(rng):
    """A mask and a gather give the same logits at labels, also for a forbidden class."""
    y, x = jnp.array([0, 2, 6, 3]), rng.standard_normal((4, 7)).astype(np.float32)
    x[1, 2] = -np.inf
    np.testing.assert_array_equal(
        MaskedReduction(-1).at_label(jnp.asarray(x), y), REDUCTION.at_label(jnp.asarray(x), y)
    )


def test_a_dominating_class_has_depth_0_in_every_pass():
    """Even if a later pass rounds its logit differently."""
    x = jnp.array([[30.0, 0, 1]])
    off = optimized_jit(REDUCTION.off_label)(jnp.array([1]), x)
    for error in (-3e-7, 3e-7):
        assert REDUCTION.depth_off_label(x * (1 + error), off)[0, 0] == 0


@pytest.mark.slow
def test_a_label_logit_that_is_rounded_differently(monkeypatch):
    """If a program recomputes the label's logit with another rounding, losses stay accurate and are never negative."""
    for error in (-3e-7, 3e-7):
        monkeypatch.setattr(Reduction, "at_label", lambda backend, x, y, error=error: backend.at(x * (1 + error), y))
        x = np.float32([[30, 0, 1], [-20, 3, -30], [1, 0.5, 0.2], [2, 2, -1]])
        y = jnp.array([0, 1, 0, 1])
        off = optimized_jit(REDUCTION.off_label)(y, x)
        with jax.enable_x64(True):
            exact = np.float64(jce.cross_entropy_with_integer_labels(y, np.float64(x)))
        np.testing.assert_allclose(surprisal_at_label(off), exact, rtol=3e-6)


@pytest.mark.wide
def test_derivatives_of_sums_in_one_pass(rng):
    """JAX can differentiate the sums twice, as it does if a loop loses the derivative rule of a loss."""
    with jax.enable_x64(True):
        y, x, t = jnp.asarray(rng.integers(0, 7, 5)), rng.standard_normal((5, 7)), rng.standard_normal((5, 7))

        @jax.jit
        def plain(x):
            _, s, t = REDUCTION.sums(x)
            return (
                jnp.sin(surprisal_at_label(REDUCTION.off_label(y, x))).sum() + jnp.sin(jnp.log1p(s) + t / (1 + s)).sum()
            )

        def loss(x):
            surprisals = jce.cross_entropy_with_integer_labels(y, x)
            return jnp.sin(surprisals).sum() + jnp.sin(jce.entropy_with_logits(x)).sum()

        for order in (jax.grad, lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (t,))[1]):
            np.testing.assert_allclose(order(plain)(x), order(loss)(x), rtol=1e-9, atol=1e-12)
