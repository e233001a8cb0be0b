"""Rows with too many classes for a fast sum in XLA on a CPU are folded into blocks. Nothing else may differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.hlo import collectives
from jce._jax.classes import Classes
from tests.kernels import ROWS, Kernel, each_of_logits, each_with_classes, easy
from tests.optimized_jit import optimized_jit

N = 33_000  # 40 blocks of 825


@pytest.mark.parametrize(
    ("n", "blocks"),
    [(10, 1), (32_768, 1), (40_009, 1), (33_000, 40), (50_257, 29), (65_536, 128), (128_256, 128), (151_936, 128)],
)
def test_blocks(n, blocks):
    """Many blocks, a power of two if possible, of at least 512 classes. A prime number of classes isn't folded."""
    x = jnp.zeros((1, n), np.float32)
    classes = Classes(-1).folding(x)
    assert classes.blocks == blocks
    assert classes.unfold(classes.fold(x)).shape == x.shape


def test_float64_rows_are_folded_at_half_as_many_classes():
    with jax.enable_x64(True):
        assert [Classes(-1).folding(jnp.zeros((1, n), np.float64)).blocks for n in (16_384, 32_768)] == [1, 64]


def derivatives(function, positions):
    """Value, gradient, and a Hessian-vector product with a direction for each argument."""

    def gradient(*arguments):
        return jax.grad(lambda *a: function(*a).sum(), positions)(*arguments)

    @jax.jit
    def all_three(arguments, directions):
        return function(*arguments), *jax.jvp(gradient, arguments, directions)

    return all_three


@each_with_classes
@pytest.mark.in_turn(5, "wide")
def test_where_equals_rows_without_the_masked_classes(kernel, rng):
    """The kept classes are in all blocks. A short row of these classes has the same value and derivatives."""
    kept = rng.random(N) < 0.5
    kept[0] = True
    if kernel.note == "smoothed":  # class 1 gets a weight from label smoothing alone
        kept[1] = True
    short = easy(kernel, rng, (3, int(kept.sum())))
    directions = [rng.standard_normal(x.shape).astype(np.float32) for x in short]
    positions = tuple(range(len(short)))

    def spread(x, rest):
        long = np.full((len(x), N), rest, x.dtype)
        long[:, kept] = x
        return long

    expected = derivatives(kernel.function, positions)(tuple(short), tuple(directions))
    got = derivatives(lambda *a: kernel.function(*a, where=kept), positions)(
        tuple(spread(x, np.nan) for x in short), tuple(spread(t, 1.0) for t in directions)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for long, brief in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_allclose(long[:, kept], brief, rtol=2e-4, atol=2e-6 * np.abs(brief).max())
        np.testing.assert_array_equal(long[:, ~kept], 0)


@each_with_classes
@pytest.mark.in_turn(5, "wide")
def test_any_axis_and_vmap(kernel, rng):
    @jax.jit
    def run(*x):
        f = kernel.function
        return f(*x), f(*(y.T for y in x), axis=0), jax.vmap(f)(*x)

    value, of_columns, batch = run(*easy(kernel, rng, (2, N)))
    np.testing.assert_allclose(of_columns, value, rtol=1e-5)
    np.testing.assert_allclose(batch, value, rtol=1e-5)


@pytest.mark.parametrize("y", [0, 824, 825, N - 1])
@pytest.mark.in_turn(2)
def test_labels_in_each_block(y, rng):
    logits = rng.standard_normal(N).astype(np.float32)
    loss, gradient = jax.value_and_grad(jce.cross_entropy_with_integer_labels, 1)(y, logits)
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(logits)[y], rtol=1e-5)
    np.testing.assert_allclose(gradient, np.asarray(jax.nn.softmax(logits)) - (np.arange(N) == y), rtol=1e-4)


@pytest.mark.holds_nan
@pytest.mark.parametrize("y", [-1, N, N + 825])
def test_a_label_outside_the_classes(y, rng):
    assert np.isnan(jce.cross_entropy_with_integer_labels(y, rng.standard_normal(N).astype(np.float32)))


@pytest.mark.holds_nan
@pytest.mark.parametrize("n", [N, 40_000])
@pytest.mark.in_turn(2)
def test_a_logit_of_infinity_makes_its_row_nan(n, rng):
    """The infinity is at the label or elsewhere. In a long row, XLA's minimum may lose the NaN of exp(∞ - ∞)."""
    logits = rng.standard_normal((4, n)).astype(np.float32)
    logits[range(3), [0, 1, -1]] = np.inf
    loss, pull_back = jax.vjp(lambda x: jce.cross_entropy_with_integer_labels(np.zeros(4, int), x), logits)
    np.testing.assert_array_equal(np.isnan(loss), [True, True, True, False])
    np.testing.assert_array_equal(np.isnan(pull_back(loss)[0]).all(1), [True, True, True, False])


@pytest.mark.slow
def test_a_head_with_many_classes(rng):
    """A head's rows are folded like rows of logits. All options are used, since each one affects the rows."""
    hidden, head = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((N, 3)).astype(np.float32)
    labels, bias = np.array([0, 824, 825, N - 1, 7, -1]), rng.standard_normal(N).astype(np.float32)

    def fused(hidden, head, bias):
        return jce.linear_cross_entropy(
            labels, hidden, head, bias, where=labels >= 0, label_smoothing=0.1, z_loss=0.1, chunk_size=2
        )

    def dense(hidden, head, bias):
        logits = hidden @ head.T + bias[None]
        loss = jce.cross_entropy_with_integer_labels(labels, logits, label_smoothing=0.1, where=(labels >= 0)[:, None])
        return (loss + 0.1 * jnp.where(labels >= 0, jax.nn.logsumexp(logits, -1) ** 2, 0)).sum() / 5

    arguments = hidden, head, bias
    directions = tuple(rng.standard_normal(x.shape).astype(np.float32) for x in arguments)
    # The gradient alone is a different program from the differentiated one: it has value and gradient in one loop.
    got, expected = (
        (optimized_jit(jax.grad(f, (0, 1, 2)))(*arguments), derivatives(f, (0, 1, 2))(arguments, directions))
        for f in (fused, dense)
    )
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-5 * np.abs(e).max())


@pytest.mark.slow
def test_log_probs_of_a_head(rng):
    hidden, head = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal((N, 4)).astype(np.float32)
    labels = np.array([0, 825, N - 1])
    got = jce.linear_log_probs(labels, hidden, head)
    np.testing.assert_allclose(got.log_prob, -jce.cross_entropy_with_integer_labels(labels, hidden @ head.T), rtol=1e-5)
    np.testing.assert_allclose(got.entropy, jce.entropy_with_logits(hidden @ head.T), rtol=1e-5)


def mesh_of(axis_type, shape=(2, 4)):
    return jax.make_mesh(shape, ("rows", "classes"), axis_types=(axis_type,) * 2)


def losses(kernel: Kernel, arguments):
    return jax.value_and_grad(lambda *a: kernel.function(*a).sum(), len(arguments) - 1)(*arguments)


@pytest.mark.needs_jit
@each_of_logits
@pytest.mark.in_turn(5, "wide")
def test_sharded_rows_are_not_gathered(kernel, rng):
    """Devices exchange only a few numbers per row, although each device's classes are folded."""
    n = 65_536
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("rows", "classes"))
    arguments = easy(kernel, rng, (4, n))
    program = optimized_jit(lambda *a: losses(kernel, a), in_shardings=(sharding,) * len(arguments))
    for collective in collectives(program.lower(*arguments).compile().as_text()):
        assert collective.size <= 8 * 4
    np.testing.assert_allclose(program(*arguments)[0], losses(kernel, arguments)[0], rtol=1e-5)


@pytest.mark.parametrize("spec", [P("rows", None), P(None, "classes"), P("rows", "classes")])
@pytest.mark.slow
def test_explicit_sharding(spec, rng):
    """JAX can't reshape an axis whose type says that it is sharded, so such rows aren't folded."""
    kernel = ROWS["cross_entropy_with_logits"]
    mesh = mesh_of(AxisType.Explicit)
    arguments = easy(kernel, rng, (4, 65_536))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arguments]
        value, gradient = optimized_jit(lambda *a: losses(kernel, a))(*placed)
        assert jax.typeof(gradient).sharding.spec == spec
    np.testing.assert_allclose(value, losses(kernel, arguments)[0], rtol=1e-5)


def test_blocks_on_each_device(rng):
    """Inside shard_map each device folds its own classes."""
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(AxisType.Auto,))
    logits, labels = rng.standard_normal((3, 2 * N)).astype(np.float32), np.array([0, N, 2 * N - 1])

    @optimized_jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(None, "classes")), out_specs=(P(), P(None, "classes")))
    def sharded(labels, logits):
        def loss(logits):
            return jce.cross_entropy_with_integer_labels(labels, logits, axis_name="classes").sum()

        return jax.value_and_grad(loss)(logits)

    value, gradient = sharded(labels, logits)
    expected, by_hand = jax.value_and_grad(lambda x: jce.cross_entropy_with_integer_labels(labels, x).sum())(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4)


@pytest.mark.needs_jit
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA fused less into its reductions")
@pytest.mark.parametrize("n", [1000, 50_257])
@pytest.mark.in_turn(2)
def test_a_hessian_vector_product_needs_no_temporary_of_the_logits_size(n):
    rows = 64
    x, y = jax.ShapeDtypeStruct((rows, n), np.float32), np.zeros(rows, np.int32)

    def hvp(x, t):
        return jax.jvp(jax.grad(lambda x: jce.cross_entropy_with_integer_labels(y, x).sum()), (x,), (t,))[1]

    temporaries = optimized_jit(hvp).lower(x, x).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * (16 * rows + n)
