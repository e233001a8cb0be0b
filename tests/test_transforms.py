"""Under every transformation of JAX, functions return the same numbers as when called plainly."""

import copy
import functools
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jce
from tests.kernels import KERNELS, LOG_Z, TAIL, Z_LOSS, each_function, each_kernel, easy, gradient, op_by_op, total

close = functools.partial(chex.assert_trees_all_close, rtol=4e-6, atol=1e-6)


@each_kernel
@pytest.mark.in_turn(9, "wide")
def test_values(kernel, rng):
    """Values are the same under jit, vmap and checkpoint, in a loop, with a derivative, and op by op."""
    function, arguments = kernel.function, tuple(easy(kernel, rng, (3, 4, 5)))
    ways = {
        "jit": function,
        "vmap": jax.vmap(function),
        "vmap of vmap": jax.vmap(jax.vmap(function), in_axes=1, out_axes=1),
        "checkpoint": jax.checkpoint(function),
        "map": lambda *x: jax.lax.map(lambda row: function(*row), x),
        "vjp": lambda *x: jax.vjp(function, *x)[0],
        "jvp": lambda *x: jax.jvp(function, x, x)[0],
        "linearize": lambda *x: jax.linearize(function, *x)[0],
    }
    expected = {"eager": function(*arguments)}
    for i, name in enumerate(kernel.arguments):  # a batch in one argument, a single row in the others
        ways[f"vmap over {name}"] = functools.partial(of_one_batch, function, i)
        expected[f"vmap over {name}"] = function(*broadcast(arguments, i))
    found = jax.jit(lambda *x: {name: f(*x) for name, f in ways.items()})(*arguments)
    for way, got in found.items():
        close(got, expected.get(way, expected["eager"]), rtol=1e-6, custom_message=way)
    with op_by_op():
        close(function(*arguments), expected["eager"], custom_message="op by op")


def of_one_batch(function, i, *arguments):
    """vmap over argument i, with the first row of every other argument."""
    mixed = [x if k == i else x[0] for k, x in enumerate(arguments)]
    return jax.vmap(function, [0 if k == i else None for k in range(len(mixed))])(*mixed)


def broadcast(arguments, i):
    return [x if k == i else np.broadcast_to(x[0], x.shape) for k, x in enumerate(arguments)]


@each_kernel
@pytest.mark.in_turn(9, "wide")
def test_gradients(kernel, rng):
    """Gradients are the same under checkpoint, scan and vmap, and agree with forward mode along a direction."""
    arguments, positions = tuple(easy(kernel, rng, (4, 5))), tuple(range(len(kernel.arguments)))
    directions = tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in arguments)
    of_sum = jax.grad(total(kernel), positions)

    def scanned(*x):
        return jax.lax.scan(lambda carry, row: (carry + total(kernel)(*row), None), 0.0, x)[0]

    ways = {
        "checkpoint": jax.grad(jax.checkpoint(total(kernel)), positions),
        "scan": jax.grad(scanned, positions),
        "vmap": jax.vmap(of_sum),
    }
    expected = {"plain": gradient(kernel)(*arguments)}
    for i, name in enumerate(kernel.arguments):
        ways[f"vmap over {name}"] = functools.partial(of_one_batch, of_sum, i)
        expected[f"vmap over {name}"] = gradient(kernel)(*broadcast(arguments, i))

    @jax.jit
    def run(arguments, directions):
        forward = {
            "jvp": jax.jvp(total(kernel), arguments, directions)[1],
            "linearize": jax.linearize(total(kernel), *arguments)[1](*directions),
        }
        return {way: f(*arguments) for way, f in ways.items()}, forward

    gradients, forward = run(arguments, directions)
    for way, got in gradients.items():
        close(got, expected.get(way, expected["plain"]), custom_message=way)
    along = sum(np.vdot(g, t) for g, t in zip(expected["plain"], directions, strict=True))
    for way, got in forward.items():
        close(got, along, rtol=1e-5, custom_message=way)


@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_a_batch_of_hessian_vector_products(kernel, rng):
    """Each product equals that of its direction alone. The batch is so large that XLA turns it into matmuls."""
    arguments = tuple(easy(kernel, rng, (256, 50)))

    def product(direction):
        return jax.jvp(gradient(kernel), arguments, (direction,) * len(arguments))[1]

    directions = rng.standard_normal((64, 256, 50)).astype(np.float32)
    together, alone = jax.jit(lambda v: (jax.vmap(product)(v), jax.lax.map(product, v)))(directions)
    # With directions in two arguments, terms as large as the largest entries cancel.
    close(together, alone, rtol=1e-5, atol=max(1e-5, 2e-7 * max(float(jnp.abs(x).max()) for x in alone)))


@pytest.mark.needs_jit  # an exported function is compiled, and rounds differently from op by op
@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_export(kernel, rng):
    """Value, gradient and a Hessian-vector product, serialized and read back. A tail stays accurate."""
    by_regime = kernel.sample(rng, (4, 5), np.float32).values()
    arguments = tuple(np.concatenate(x) for x in zip(*by_regime, strict=True))
    exported = jax.export.export(jax.jit(kernel.function))(*arguments).serialize(vjp_order=2)
    restored = jax.export.deserialize(exported)
    pull = restored.vjp()
    cotangent = np.ones(restored.out_avals[0].shape, np.float32)
    call, pull_back = jax.jit(restored.call), jax.jit(pull.call)
    values, gradients = call(*arguments), pull_back(*arguments, cotangent)
    same = functools.partial(close, rtol=1e-6, atol=0)
    plain = jax.jit(lambda *x: (kernel.function(*x), gradient(kernel)(*x)))
    same((values, tuple(gradients)), plain(*arguments))
    directions = tuple(np.where(np.isfinite(x), x, 0).astype(np.float32) for x in arguments)
    products = jax.jit(pull.vjp().call)(*arguments, cotangent, *directions)
    expected = jax.jit(lambda x, t: jax.vjp(gradient(kernel), *x)[1](t))(arguments, directions)
    # A direction's differences from its mean are only as exact as its rounding: to .06 under a common offset of 10⁶.
    rounding = 2e-7 * functools.reduce(np.maximum, [np.abs(x).max(-1, keepdims=True) for x in directions])
    for got, true in zip(map(np.asarray, products), map(np.asarray, expected), strict=False):
        with np.errstate(invalid="ignore"):
            near = np.abs(got - true) <= 1e-5 * (1 + np.abs(true)) + rounding
        assert (near | (got == true) | (np.isnan(got) & np.isnan(true))).all()


@pytest.mark.needs_jit
@each_function
@pytest.mark.in_turn(8, "wide")
def test_export_of_any_number_of_rows(kernel, rng):
    """Value and gradient for a symbolic number of rows, serialized and read back. A second argument is a single row."""
    (rows,) = jax.export.symbolic_shape("rows")
    arguments = easy(kernel, rng, (7, 5))
    arguments = [arguments[0], *(x[0] for x in arguments[1:])]
    mask = {"where": np.arange(5) < 4} if kernel.has_classes else {}

    def program(*x):
        return kernel.function(*x, **mask), jax.grad(lambda *x: kernel.function(*x, **mask).sum())(*x)

    shapes = [jax.ShapeDtypeStruct((rows, 5) if x.ndim == 2 else (5,), np.float32) for x in arguments]
    exported = jax.export.export(jax.jit(program))(*shapes)
    call = jax.jit(jax.export.deserialize(exported.serialize()).call)
    close(call(*arguments), jax.jit(program)(*arguments))


@pytest.mark.needs_jit
@pytest.mark.parametrize("reduction", ["mean", "none", "log_probs"])
@pytest.mark.slow
def test_export_of_any_number_of_tokens(reduction, rng):
    """With two symbolic token axes, so the number of chunks is symbolic. Called with one token and with several."""
    batch, n, d = jax.export.symbolic_shape("batch, length"), 4, 3
    head = rng.standard_normal((n, d)).astype(np.float32)

    def loss(labels, hidden, where):
        if reduction == "log_probs":
            return jce.linear_log_probs(labels, hidden, head, where=where, chunk_size=4)
        return jce.linear_cross_entropy(labels, hidden, head, where=where, chunk_size=4, reduction=reduction)

    def program(labels, hidden, where):
        def total(hidden):
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(loss(labels, hidden, where)))

        return loss(labels, hidden, where), jax.grad(total)(hidden)

    shapes = [(batch, np.int32), ((*batch, d), np.float32), (batch, bool)]
    exported = jax.export.export(jax.jit(program))(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    call = jax.export.deserialize(exported.serialize()).call
    for batch in ((1, 1), (3, 5)):
        labels, where = rng.integers(0, n, batch, np.int32), rng.random(batch) < 0.8
        arguments = labels, rng.standard_normal((*batch, d)).astype(np.float32), where
        close(call(*arguments), jax.jit(program)(*arguments))


@pytest.mark.needs_jit
def test_export_of_any_number_of_tokens_for_every_platform():
    """On accelerators the first chunk precedes the loop, but only if the number of chunks is known."""
    (tokens,) = jax.export.symbolic_shape("tokens")
    shapes = [((tokens,), np.int32), ((tokens, 3), np.float32), ((4, 3), np.float32)]
    gradient = jax.jit(jax.grad(jce.linear_cross_entropy, (1, 2)))
    export = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))
    exported = export(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert [aval.shape for aval in exported.out_avals] == [(tokens, 3), (4, 3)]


# Ahead of time


def negated(function):
    """A wrapper such as a user may write."""

    @functools.wraps(function)
    def wrapper(*arguments):
        return jax.tree.map(jnp.negative, function(*arguments))

    return wrapper


TRANSFORMED = (jax.grad, jax.value_and_grad, jax.jacfwd, jax.vmap, jax.checkpoint, negated)
PROGRAMS = [n for n in jce.__all__ if hasattr(getattr(jce, n), "__wrapped__")]  # the jitted functions
each_public = pytest.mark.parametrize("name", PROGRAMS)


def one(name):
    """Arguments of a public function for one number, one distribution or one token."""
    row, elementwise = np.float32([0.5, 0.25, 0.25]), "binary" in name or "sampled" in name
    if name == "linear_kl_divergence":
        return [jce.Linear(row, head) for head in np.float32([np.eye(3), 2 * np.eye(3)])]
    given = {"labels": np.int32(1), "head": np.eye(3, dtype=np.float32)}
    parameters = inspect.signature(getattr(jce, name)).parameters
    required = [k for k, v in parameters.items() if v.default is v.empty or k == "head"]
    return [given.get(k, row[0] if elementwise else row) for k in required]


@pytest.mark.needs_jit
@each_public
@pytest.mark.parametrize("transform", [lambda f: f, *TRANSFORMED], ids=["none", *(f.__name__ for f in TRANSFORMED)])
@pytest.mark.one_for_each("name")
def test_lowering_a_transformed_function(name, transform):
    function, arguments = getattr(jce, name), one(name)
    if name == "linear_log_probs" and transform in (jax.grad, jax.value_and_grad):
        pytest.skip("returns two numbers per token")
    differentiates = transform in (jax.grad, jax.value_and_grad, jax.jacfwd)
    labelled = "labels" in inspect.signature(function).parameters
    transformed = transform(function, argnums=1) if differentiates and labelled else transform(function)
    assert not hasattr(transformed, "lower")
    if transform is jax.vmap:
        arguments = jax.tree.map(lambda x: np.stack([x, x]), arguments)
    jitted = jax.jit(transformed)
    close(jitted.lower(*arguments).compile()(*arguments), jitted(*arguments))


@each_public
def test_a_public_function_is_a_plain_function(name):
    """`inspect`, `pickle`, `copy` and classes treat a public function as a plain function with its own name."""
    function = getattr(jce, name)
    assert inspect.isroutine(function)
    assert function.__name__ == name
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    assert type("Holder", (), {"loss": function})().loss.__func__ is function


@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_shapes(kernel, rng):
    """No batch, an empty batch, five axes; one class and none."""
    tail = (4,) if kernel.has_classes else ()
    batches = ((), (0,), (2, 0, 3), (2, 1, 3, 2))
    row = [x if tail else x[0] for x in easy(kernel, rng, (4,))]
    each = [[np.broadcast_to(x, (*batch, *tail)) for x in row] for batch in batches]
    if kernel.has_classes:
        each += [[np.full((3, n), 1, np.float32) for _ in kernel.arguments] for n in (0, 1)]
        batches += ((3,), (3,))

    @jax.jit
    def run(each):
        return [kernel.function(*x) for x in each], [gradient(kernel)(*x) for x in each]

    values, gradients = run(each)
    assert [value.shape for value in values] == list(batches)
    for arguments, found in zip(each, gradients, strict=True):
        assert [g.shape for g in found] == [x.shape for x in arguments]
    if kernel.has_classes:
        none, one = values[-2:]
        np.testing.assert_array_equal(none, np.zeros(3))
        expected = {TAIL: -np.inf, "z-loss": Z_LOSS, LOG_Z: 1}.get(kernel.note, 0)
        np.testing.assert_array_equal(one, np.full(3, expected))


@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_sharded_arrays(kernel, rng):
    """The numbers are the same if rows, classes or both (in turn) are split over eight devices."""
    axes = [("rows", None), (None, "classes"), ("rows", "classes")][KERNELS.index(kernel) % 3]
    mesh = jax.make_mesh((4, 2), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    arguments = easy(kernel, rng, (8, 16))
    sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes))) for x in arguments]

    @jax.jit
    def run(*x):
        return kernel.function(*x), gradient(kernel)(*x)

    close(run(*sharded), run(*arguments))


@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_inside_shard_map(kernel, rng):
    """Value, gradient and jvp with rows split over eight devices, under JAX's checks of varying axes; also at 0."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    arguments = tuple(x.copy() for x in easy(kernel, rng, (8, 4)))
    for x in arguments:
        x[0] = 0
    sharded = jax.shard_map(kernel.function, mesh=mesh, in_specs=(rows,) * len(arguments), out_specs=rows)

    def sharded_total(*x):
        return sharded(*x).sum()

    positions = tuple(range(len(arguments)))
    tangents = tuple(np.where(x == 0, 0, x).astype(np.float32) for x in arguments)

    @jax.jit
    def run(x, t):
        return {
            name: (each(*x), jax.grad(f, positions)(*x), jax.jvp(f, x, t))
            for name, each, f in (("sharded", sharded, sharded_total), ("plain", kernel.function, total(kernel)))
        }

    found = run(arguments, tangents)
    close(found["sharded"], found["plain"])
