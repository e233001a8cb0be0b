"""Classes split over devices inside shard_map, and the sharded head: results and communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench import devices as study
from bench.hlo import collectives, group_size
from tests.kernels import LOGIT, OF_LOGITS, each_of_logits, easy, modes
from tests.optimized_jit import optimized_jit
from tests.test_corners import agrees, stacked

pytestmark = pytest.mark.needs_jit  # without jit, JAX takes minutes for a jax.shard_map, or fails
INF, NAN = np.inf, np.nan
MESHES = [(8, 1), (2, 4), (1, 8)]

on_meshes = pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))


def make_mesh(shape):
    return jax.make_mesh(shape, ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2)


def on_mesh(mesh, token_axis="tokens", class_axis="classes"):
    return jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis=token_axis, class_axis=class_axis)


def close(a, b, rtol=4e-6, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def second_order(function, positions):
    """Value, gradient, jvp and Hessian-vector products in three nestings, as one program (arguments, directions)."""
    programs = modes(function, positions)
    wanted = [name for name in programs if name not in ("linearize", "third order")]
    return jax.jit(lambda a, t: {name: programs[name](a, t) for name in wanted})


# Functions of logits


@each_of_logits
@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
@pytest.mark.one_for_each("kernel")
@pytest.mark.in_turn(4, "wide")
def test_split_classes_against_unsplit_ones(kernel, shape, rng):
    """Value, gradient, jvp and Hessian-vector products agree in float64, also for rows with a −∞ or a tie."""
    arguments = tuple(easy(kernel, rng, (16, 24), np.float64))
    for x, domain in zip(arguments, kernel.domains, strict=True):
        if domain == LOGIT:
            x[1, [2, 7]] = x[1].max() + 1
            if kernel.note != "smoothed":
                x[0, 5] = -INF
    if kernel.domains[0] != LOGIT:
        arguments[0][0, 5] = 0
    directions = tuple(np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for x in arguments)
    cotangent, block = rng.standard_normal(16), P("tokens", "classes")
    split = jax.shard_map(
        lambda *x: kernel.function(*x, axis_name="classes"),
        mesh=make_mesh(shape),
        in_specs=(block,) * len(arguments),
        out_specs=P("tokens"),
    )
    positions = tuple(range(len(arguments)))
    with jax.enable_x64(True):
        got, expected = (
            second_order(lambda *x, f=f: jnp.vdot(cotangent, f(*x)), positions)(arguments, directions)
            for f in (split, kernel.function)
        )
    close(got, expected, rtol=1e-9, atol=1e-11)


def split_rows(kernel):
    """The kernel's function with four classes, or sixteen, over four devices."""
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    specs = (P(None, "classes"),) * len(kernel.arguments)
    return jax.shard_map(lambda *x: kernel.function(*x, axis_name="classes"), mesh=mesh, in_specs=specs, out_specs=P())


@each_of_logits
@pytest.mark.in_turn(3, "wide")
def test_edge_cases_with_few_classes_per_device(kernel):
    arguments, values, gradients = stacked(kernel)
    split = split_rows(kernel)

    @jax.jit
    def run(*x):
        return split(*x), jax.grad(lambda *x: split(*x).sum(), tuple(range(len(x))))(*x)

    found, g = run(*arguments)
    agrees(found, values)
    for got, expected in zip(g, gradients, strict=True):
        agrees(got, expected)


@each_of_logits
@pytest.mark.in_turn(5, "wide")
def test_accuracy_of_split_classes(kernel, rng):
    """In float32, for all kinds of samples: even a loss of 1e-30 or a divergence of 1e-12 is accurate."""
    samples = kernel.sample(rng, (3, 16), np.float32)
    arguments = tuple(np.concatenate(x) for x in zip(*samples.values(), strict=True))
    split = split_rows(kernel)
    positions = tuple(range(len(arguments)))

    @optimized_jit
    def run(*x):
        return [(f(*x), jax.grad(lambda *x, f=f: f(*x).sum(), positions)(*x)) for f in (split, kernel.function)]

    (values, got), (of_whole, expected) = run(*arguments)
    np.testing.assert_allclose(values, of_whole, rtol=1e-6, atol=1e-37)
    for g, e in zip(got, map(np.asarray, expected), strict=True):
        finite = np.isfinite(e)
        np.testing.assert_array_equal(np.asarray(g)[~finite], e[~finite])
        # Relative to a row's largest entry, and for a target p to at least 1, because entries may pass through 0.
        scale = np.maximum(np.abs(np.where(finite, e, 0)).max(-1, keepdims=True), kernel.arguments[0] == "p")
        error = np.abs(np.subtract(g, e, where=finite, out=np.zeros_like(e)))
        assert (error <= 1e-6 * scale + 1e-37).all()


@pytest.mark.holds_nan
@pytest.mark.slow
def test_labels_index_the_classes_of_all_devices(rng):
    """Every class as label, and labels outside [0, n), including those that would wrap around within a block."""
    n = 16
    labels = np.concatenate([np.arange(n), [-1, -2, n, n + 1, 2**31 - 1, -(2**31), 0, 1]])
    logits = rng.standard_normal((len(labels), n)).astype(np.float32)

    def split(logits, **options):
        return jax.shard_map(
            lambda y, x: jce.cross_entropy_with_integer_labels(y, x, axis_name="classes", **options),
            mesh=make_mesh((2, 4)),
            in_specs=(P("tokens"), P("tokens", "classes")),
            out_specs=P("tokens"),
        )(labels, logits)

    for options in ({}, {"label_smoothing": 0.1}):
        expected = jce.cross_entropy_with_integer_labels(labels, logits, **options)
        assert np.isnan(expected).sum() == 6
        close(split(logits, **options), expected)
        close(
            jax.grad(lambda x, o=options: jnp.nansum(split(x, **o)))(logits),
            jax.grad(lambda x, o=options: jnp.nansum(jce.cross_entropy_with_integer_labels(labels, x, **o)))(logits),
        )


@pytest.mark.holds_nan
@pytest.mark.slow
def test_where_masks_classes_and_rows_on_all_devices(rng):
    logits = rng.standard_normal((8, 16)).astype(np.float32)
    where = rng.random((8, 16)) < 0.7
    where[:2], where[2, :12] = False, False
    labels = where.argmax(1)
    logits[0] = NAN
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing}
        split = jax.shard_map(
            lambda y, x, w, o=options: jce.cross_entropy_with_integer_labels(y, x, where=w, axis_name="classes", **o),
            mesh=make_mesh((2, 4)),
            in_specs=(P("tokens"), P("tokens", "classes"), P("tokens", "classes")),
            out_specs=P("tokens"),
        )

        def whole(y, x, w, o=options):
            return jce.cross_entropy_with_integer_labels(y, x, where=w, **o)

        close(split(labels, logits, where), whole(labels, logits, where))
        close(*(jax.grad(lambda x, f=f: f(labels, x, where).sum())(logits) for f in (split, whole)))


def test_an_axis_name_that_does_not_exist():
    for function, arguments in (
        (jce.entropy_with_logits, (np.zeros(3),)),
        (jce.linear_cross_entropy, (0, np.zeros(2), np.zeros((3, 2)))),
        (jce.linear_log_probs, (0, np.zeros(2), np.zeros((3, 2)))),
    ):
        with pytest.raises(
            ValueError, match=rf"{function.__name__}: axis_name must name an axis.*got axis_name='model'"
        ):
            function(*arguments, axis_name="model")


# The sharded head


def problem(rng, tokens=16, d=5, n=24, dtype=np.float64):
    labels = rng.integers(0, n, tokens)
    labels[3], labels[5] = -100, n - 1
    a = rng.standard_normal((tokens, d)), rng.standard_normal((n, d)), rng.standard_normal(n), rng.random(tokens)
    a = tuple(x.astype(dtype) for x in a)
    a[0][3], a[0][8] = NAN, np.finfo(dtype).max  # masked, like token 13
    a[3][5] = 0  # the label of token 5 is in the last block
    return labels, a, np.arange(tokens) % 5 != 3


OPTIONS = [
    {"reduction": "mean"},
    {"reduction": "mean", "label_smoothing": 0.1, "z_loss": 0.01, "logit_soft_cap": 3.0},
    {"reduction": "sum", "label_smoothing": 1.0},
    {"reduction": "none", "z_loss": 0.01},
    {"reduction": "none", "label_smoothing": 0.1, "logit_soft_cap": 3.0},
]


@pytest.mark.parametrize(
    ("shape", "options"),
    [(MESHES[i % 3], options) for i, options in enumerate(OPTIONS)] + [((2, 4), OPTIONS[3])],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "x".join(map(str, x)),
)
@pytest.mark.slow
def test_sharded_head_against_unsharded_head(shape, options, rng):
    """All modes, with respect to hidden states, head, bias and weights, with unevenly masked tokens."""
    labels, arguments, where = problem(rng)
    directions = tuple(np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for x in arguments)
    cotangent = rng.standard_normal(len(labels)) if options["reduction"] == "none" else np.ones(())

    def scalar(function):
        def of(h, w, b, weights):
            losses = function(labels, h, w, b, weights=weights, where=where, chunk_size=3, **options)
            return jnp.vdot(cotangent, losses)

        return second_order(of, (0, 1, 2, 3))

    with jax.enable_x64(True):
        got = scalar(on_mesh(make_mesh(shape)))(arguments, directions)
        expected = scalar(jce.linear_cross_entropy)(arguments, directions)
    close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_third_order_of_the_sharded_head(reduction, rng):
    labels, (h, w, _, _), where = problem(rng)
    a = h, w
    t = tuple(rng.standard_normal(x.shape) for x in a)

    def third(function):
        def loss(h, w):
            return function(labels, h, w, where=where, reduction=reduction, chunk_size=3).sum()

        def along(f):
            return lambda *a: jax.jvp(f, a, t)[1]

        return jax.jit(jax.grad(along(along(loss)), (0, 1)))(*a)

    with jax.enable_x64(True):
        close(third(on_mesh(make_mesh((2, 4)))), third(jce.linear_cross_entropy), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_log_probs_of_a_sharded_head(rng):
    labels, (h, w, b, _), where = problem(rng)

    def split(h, w, b):
        return jax.shard_map(
            lambda y, h, w, b, m: jce.linear_log_probs(y, h, w, b, where=m, chunk_size=3, axis_name="classes"),
            mesh=make_mesh((2, 4)),
            in_specs=(P("tokens"), P("tokens"), P("classes"), P("classes"), P("tokens")),
            out_specs=P("tokens"),
        )(labels, h, w, b, where)

    def whole(h, w, b):
        return jce.linear_log_probs(labels, h, w, b, where=where)

    def scalar(f):
        return second_order(lambda *a: sum(jnp.vdot(jnp.arange(1.0, 17.0), x) for x in f(*a)), (0, 1, 2))

    directions = tuple(np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for x in (h, w, b))
    with jax.enable_x64(True):
        close(*(scalar(f)((h, w, b), directions) for f in (split, whole)), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_one_several_or_no_axis_names(rng):
    labels, (h, w, b, _), where = problem(rng, dtype=np.float32)
    expected = jce.linear_cross_entropy(labels, h, w, b, where=where)
    mesh = make_mesh((2, 4))
    for tokens, classes in (
        ("tokens", None),
        (None, "classes"),
        (("tokens", "classes"), None),
        (None, ("classes", "tokens")),
        ((), "classes"),
        ("tokens", ()),
    ):
        close(on_mesh(mesh, tokens, classes)(labels, h, w, b, where=where), expected)


@pytest.mark.wide
def test_batches_of_sequences_with_a_scalar_weight(rng):
    labels, (h, w, _, _), where = problem(rng, dtype=np.float32)
    args = labels.reshape(8, 2), h.reshape(8, 2, -1), w  # only the first axis is split, and divided by 4
    for reduction in ("mean", "sum", "none"):
        options = {"where": where.reshape(8, 2), "weights": 0.5, "reduction": reduction}
        close(on_mesh(make_mesh((4, 2)))(*args, **options), jce.linear_cross_entropy(*args, **options))


@pytest.mark.slow
def test_a_mesh_with_explicit_axes(rng):
    """Sharded and unsharded arguments give the same results."""
    mesh = jax.make_mesh((2, 4), ("tokens", "classes"), axis_types=(AxisType.Explicit,) * 2)
    labels, (h, w, _, _), where = problem(rng, dtype=np.float32)

    def loss(h, w):
        return on_mesh(mesh)(labels, h, w, where=where)

    expected = jax.value_and_grad(lambda h, w: jce.linear_cross_entropy(labels, h, w, where=where), (0, 1))(h, w)
    split = [jax.device_put(x, NamedSharding(mesh, P(axis))) for x, axis in ((h, "tokens"), (w, "classes"))]
    for arguments in ((h, w), split):
        close(jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments), expected)


# Communication


def test_an_eager_call_is_one_dispatch():
    def loss(hidden, head):
        return on_mesh(make_mesh((2, 4)))(np.zeros(4, int), hidden, head)

    (equation,) = jax.make_jaxpr(loss)(np.zeros((4, 2)), np.zeros((8, 2))).eqns
    assert equation.params["name"] == "linear_cross_entropy"


@on_meshes
@pytest.mark.slow
def test_communication_in_the_loop_and_after_it(shape):
    """In the loop, an all-reduce has at most one number per token. The head's gradient is sent once, after the loop."""
    tokens, d, n, chunk = 256, 16, 1024, 8
    mesh = make_mesh(shape)

    def abstract(shape, axis, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(axis)))

    hidden, head = abstract((tokens, d), "tokens"), abstract((n, d), "classes")
    labels = abstract((tokens,), "tokens", np.int32)

    def loss(hidden, head, labels):
        return on_mesh(mesh)(labels, hidden, head, chunk_size=chunk)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, labels).compile()
    local_tokens, local_n = tokens // shape[0], n // shape[1]
    sent = collectives(program.as_text())
    assert sent
    assert {c.kind for c in sent} <= {"all-reduce"}
    for _, size, in_loop in sent:
        assert size <= (chunk if in_loop else max(local_tokens * d, local_n * d))
    whole_head = [size for _, size, in_loop in sent if not in_loop and size == local_n * d]
    assert len(whole_head) == (1 if shape[0] > 1 else 0)


@pytest.mark.slow
def test_communication_and_memory_against_the_partitioner():
    """Against the dense loss under XLA's partitioner: at most 1.05 times the bytes sent, and a third of the memory."""
    tokens, d, n = 1024, 32, 4096
    mesh = make_mesh((2, 4))
    specs = [((tokens, d), P("tokens")), ((n, d), P("classes"))]
    arrays = [jax.ShapeDtypeStruct(s, np.float32, sharding=NamedSharding(mesh, p)) for s, p in specs]
    labels = np.zeros(tokens, np.int32)

    def ours(h, w):
        return on_mesh(mesh)(labels, h, w, chunk_size=64)

    def dense(h, w):
        return jce.cross_entropy_with_integer_labels(labels, h @ w.T).mean()

    sent, memory = {}, {}
    for f in (ours, dense):
        program = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arrays).compile()
        text = program.as_text()
        trips = tokens // 2 // 64
        sent[f] = sum(4 * size * (trips if in_loop else 1) for _, size, in_loop in collectives(text))
        memory[f] = program.memory_analysis().temp_size_in_bytes
    assert sent[ours] < 1.05 * sent[dense]
    assert memory[ours] < memory[dense] / 3


@pytest.mark.slow
def test_a_head_with_the_same_part_on_all_devices(rng):
    y, h, w = rng.integers(0, 24, 5), rng.standard_normal((5, 2)), rng.standard_normal((6, 2))
    h, w = h.astype(np.float32), w.astype(np.float32)
    mesh = make_mesh((2, 4))
    split = jax.shard_map(
        lambda h, w: jce.linear_cross_entropy(y, h, w, axis_name="classes"), mesh=mesh, in_specs=P(), out_specs=P()
    )
    four = lambda h, w: jce.linear_cross_entropy(y, h, jnp.tile(w, (4, 1)))  # noqa: E731
    close(*(jax.jit(jax.value_and_grad(f, (0, 1)))(h, w) for f in (split, four)))


@pytest.mark.slow
def test_no_classes_on_several_devices():
    """A sum over no classes is 0, also on eight devices."""
    mesh, nothing = make_mesh((2, 4)), np.zeros((2, 0), np.float32)
    for kernel in OF_LOGITS:
        split = jax.shard_map(
            lambda *x, kernel=kernel: kernel.function(*x, axis_name="classes"),
            mesh=mesh,
            in_specs=P("tokens", "classes"),
            out_specs=P("tokens"),
        )
        np.testing.assert_array_equal(split(*[nothing] * len(kernel.arguments)), np.zeros(2))
    losses = on_mesh(mesh)(np.zeros(2, int), np.ones((2, 3)), np.ones((0, 3)), reduction="none")
    np.testing.assert_array_equal(losses, np.zeros(2))


def test_a_fully_masked_row_on_several_devices():
    """A fully masked row has loss 0 for any label. One device may hold all kept classes of a row."""
    mesh = make_mesh((2, 4))
    x, kept = np.tile(np.arange(8, dtype=np.float32), (2, 1)), np.array([[False] * 8, [True] * 2 + [False] * 6])

    def part(labels, x, kept):
        return jce.cross_entropy_with_integer_labels(labels, x, where=kept, axis_name="classes")

    specs = P("tokens"), P("tokens", "classes"), P("tokens", "classes")
    split = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("tokens"))
    np.testing.assert_allclose(split(np.array([9, 0]), x, kept), [0, np.log(1 + np.e)], rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": np.zeros(3, int), "hidden": np.zeros((3, 2))},
            r"the number of tokens.*must be a multiple of the 2 .*got 3",
        ),
        ({"head": np.zeros((6, 2))}, r"the number of classes.*must be a multiple of the 4 .*got 6"),
        ({"hidden": np.zeros((4, 3))}, r"hidden must be \[..., d\]"),
        ({"reduction": "avg"}, r"reduction must be"),
        ({"label_smoothing": 2.0}, r"label_smoothing must be"),
        ({"z_loss": -1.0}, r"z_loss must be"),
        ({"logit_soft_cap": 0}, r"logit_soft_cap must be"),
        ({"chunk_size": 0}, r"chunk_size must be"),
        ({"labels": 0, "hidden": np.zeros(2)}, r"labels and hidden must have a first axis.*a single token"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_of_a_call_on_a_mesh(change, message):
    """The message names the function that is called. `tests/test_on_mesh.py` has the errors of `on_mesh` itself."""
    arguments = {"labels": np.zeros(4, int), "hidden": np.zeros((4, 2)), "head": np.zeros((8, 2))} | change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: .*{message}"):
        on_mesh(make_mesh((2, 4)))(**arguments)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0},{1},{2},{3}}", 1),
        ("{{0,2},{1,3}}", 2),
        ("[4,2]<=[8]", 2),
        ("[8,1]<=[8]", 1),
        ("mesh['a'=1,'b'=8] {'b'}", 8),
        ("mesh['a'=1,'b'=8] {'a'}", 1),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ],
)
def test_group_sizes_in_xla_programs(groups, size):
    assert group_size(f"%x = f32[8] all-reduce(%y), replica_groups={groups}, to_apply=%z") == size


# The cost model for larger meshes


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
@pytest.mark.slow
def test_the_scaling_study_counts_the_bytes_that_are_sent(mesh):
    sizes = (64, 8, 256, *mesh)
    assert study.check(*sizes, chunk=4) == study.sent(*sizes)


def test_one_step_of_the_scaling_study():
    machine = {"flops": 1e15, "bandwidth": 1e11, "latency": 0.0}
    step = study.step(4, 2, **machine)
    assert step.compute == pytest.approx(6 * 2**22 * 2**13 * 2**18 / 8 / 1e15)
    assert step.hidden == pytest.approx(4 * 2**20 * 2**13 / 1e11)
    assert step.head == pytest.approx(1.5 * 4 * 2**17 * 2**13 / 1e11)
    assert study.best(8, **machine).total <= step.total
