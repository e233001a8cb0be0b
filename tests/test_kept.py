"""Masked tokens: their values have no effect on results, and only as many chunks run as the kept tokens fill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from jce import Linear
from jce._heads.loop import chunks
from jce._heads.loop.kept_tokens import over_kept
from jce._heads.places.part import counts
from tests.kernels import modes
from tests.test_devices import close

TOKENS, CLASSES, WIDTH, CHUNK = 11, 8, 3, 4
ce = jce.cross_entropy_with_integer_labels
MASKS = {
    "none": np.zeros(TOKENS, bool),
    "one, the last": np.arange(TOKENS) == TOKENS - 1,
    "a chunk": np.arange(TOKENS) % 3 == 1,
    "some": np.arange(TOKENS) % 4 != 2,
    "all": np.ones(TOKENS, bool),
}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.in_turn(2)
def test_a_loop_runs_only_chunks_with_kept_tokens(devices):
    """The number of chunks is right, the kept tokens stay in order, and each token's results are in its place."""
    keys = jax.random.split(jax.random.key(0), TOKENS)

    def step(total, chunk):
        assert total is None
        i, key = chunk
        return (jnp.ones((), int), i.sum()), (i + 1, jax.vmap(jax.random.bits)(key), i.shape[0] * jnp.ones_like(i))

    run = jax.jit(lambda kept: over_kept(step, kept, 3, devices, (jnp.arange(TOKENS), keys)))
    for kept in MASKS.values():
        (chunks, total), (results, bits, size) = run(kept)
        shares = np.array_split(kept, [6]) if devices == 2 else [kept]
        size_of_one = -(-max(map(len, shares)) // 3)
        assert chunks == max(-(-share.sum() // size_of_one) for share in shares)
        assert total == np.arange(TOKENS)[kept].sum()
        np.testing.assert_array_equal(results, np.where(kept, np.arange(TOKENS) + 1, 0))
        np.testing.assert_array_equal(bits, np.where(kept, jax.vmap(jax.random.bits)(keys), 0))
        np.testing.assert_array_equal(size, np.where(kept, devices * size_of_one, 0))


@pytest.mark.needs_jit
@pytest.mark.slow
def test_a_batch_of_loops_against_single_loops(rng):
    """Value and gradients, for batches of masks (with different numbers of chunks), tokens, a shared number, or all."""

    def loop(kept, x, w):
        sums, results = over_kept(lambda _, x: (x.sum(0) ** 2 * w, jnp.sin(x * w)), kept, 3, 1, x)
        return sums.sum() + (jnp.arange(1.0, TOKENS + 1)[:, None] * results).sum()

    def program(kept, x, w):
        return loop(kept, x, w), jax.grad(loop, 1)(kept, x, w), jax.grad(loop, 2)(kept, x, w)

    masks, batch, at = np.stack(list(MASKS.values())), len(MASKS), (0, 1, 0)
    arguments = masks, rng.standard_normal((TOKENS, batch, 2)), rng.standard_normal(batch)

    def of_batch(axes, member=2):
        """The arguments. An argument without a batch axis is that of one batch entry."""
        return [a if k is not None else jnp.take(a, member, j) for a, k, j in zip(arguments, axes, at, strict=True)]

    def one_by_one(axes):
        members = [
            program(*(a if k is None else jnp.take(a, i, k) for a, k in zip(of_batch(axes), axes, strict=True)))
            for i in range(batch)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *members)

    def both():
        some = (0, None, None), (None, 1, None), (None, None, 0), at
        return [(jax.vmap(program, axes)(*of_batch(axes)), one_by_one(axes)) for axes in some]

    for got, expected in jax.jit(both)():
        close(got, expected, rtol=1e-5, atol=1e-5)


# Functions of labels, a teacher, a student, weights and a number t. `on` is the identity or `jce.on_mesh`.


def real_bool_and_sample(t):
    return lambda key, y, x: (t * ce(y, x), x.argmax() == y, jax.random.categorical(key, x))


FUNCTIONS = {
    "losses": lambda on, y, p, q, a, t, **o: on(jce.linear_cross_entropy)(
        y, q.hidden, q.head, jnp.arange(8.0) / t, weights=a, label_smoothing=0.1, z_loss=0.1, logit_soft_cap=t, **o
    ),
    "log-probabilities": lambda on, y, p, q, a, t, **o: on(jce.linear_log_probs)(
        y, q.hidden, q.head, logit_soft_cap=t, **o
    ),
    "divergence": lambda on, y, p, q, a, t, **o: on(jce.linear_kl_divergence)(p, q, weights=a, temperature=t, **o),
    "lists": lambda on, y, p, q, a, t, **o: on(jce.linear_cross_entropy)(
        jnp.stack([y, y + 1], 1), q.hidden, q.head, label_probs=jnp.full((y.size, 2), 0.4), tail=True, **o
    ),
    "map": lambda on, y, p, q, a, t, **o: on(jce.linear_map)(
        real_bool_and_sample(t), jax.random.split(jax.random.key(0), y.size), y, q, **o
    ),
    "map of a number": lambda on, y, p, q, a, t, **o: on(jce.linear_map)(
        lambda y, x, t: t * ce(y, x), y, q, weights=a, shared=t, **o
    ),
}
WEIGHTED = ("losses", "divergence", "map of a number")
FIRST, SECOND = ("gradient",), ("forward over reverse", "reverse over reverse")
modes_in_turn = pytest.mark.parametrize(
    "wanted",
    [pytest.param(FIRST, id="first"), pytest.param(SECOND, id="second", marks=(pytest.mark.slow, pytest.mark.long))],
)
CASES = [(name, how) for how in ("mean", "none", "sum") for name in FUNCTIONS if name[:3] != "log" or how == "none"]


def numbers(rng, tokens=TOKENS):
    """Two pairs of hidden states and a head, then weights, and t."""
    shapes = (tokens, WIDTH), (CLASSES, WIDTH), (tokens, 2), (CLASSES, 2)
    return (*(rng.standard_normal(shape) for shape in shapes), rng.random(tokens) - 0.2, np.array(1.5))


def arguments(kept, y, label, fill, h, w, k, v, a, t):
    """The arguments, made in the same program. Masked tokens hold `label` and `fill`."""
    h, k = (jnp.where(kept[:, None], x, fill) for x in (jnp.tanh(h), 2 * jnp.sin(k)))
    return jnp.where(kept, y, label), Linear(h, w), Linear(k, v), a, t


def total(results):
    """A number that depends on every result."""
    reals = [x.astype(float).ravel() for x in jax.tree.leaves(results)]
    return sum((jnp.cos(jnp.arange(1.0, x.size + 1)) * jnp.sin(x)).sum() for x in reals)


def left_out(name, reduction, kept, y, label, fill, x, on=lambda f: f, chunk=CHUNK):
    """The results if the function masks tokens."""
    options = {"where": kept, "chunk_size": chunk} | ({} if name[:3] == "log" else {"reduction": reduction})
    return total(FUNCTIONS[name](on, *arguments(kept, y, label, fill, *x), **options))


def left_out_after(name, reduction, kept, y, label, fill, x):
    """The results if each token's results are computed without a mask, and masked afterwards."""
    options = {} if name[:3] == "log" else {"reduction": "none"}
    each = FUNCTIONS[name](lambda f: f, *arguments(kept, y, label, fill, *x), chunk_size=CHUNK, **options)
    each = jax.tree.map(lambda x: jnp.where(kept, x, jnp.zeros_like(x)), each)
    if reduction == "none":
        return total(each)
    w = jnp.where(kept, x[-2] if name in WEIGHTED else 1.0, 0.0).sum()
    w = jnp.where(w == 0, 1.0, w) if reduction == "mean" else 1.0
    return total(jax.tree.map(lambda x: x.astype(float).sum() / w, each))


def everything(of, wanted, name, reduction, **options):
    """Value, gradient or Hessian-vector products with respect to all numbers, in one program."""

    def program(kept, y, label, fill, x, directions):
        programs = modes(lambda *x: of(name, reduction, kept, y, label, fill, x, **options), tuple(range(len(x))))
        return [programs[mode](x, directions) for mode in wanted]

    return jax.jit(program)


@pytest.mark.needs_jit
@pytest.mark.holds_nan
@pytest.mark.parametrize(("name", "reduction"), CASES)
@modes_in_turn
@pytest.mark.in_turn(16)
def test_results_of_masked_tokens_agree_with_masking_afterwards(name, reduction, wanted, rng):
    """Results in float64. The values of masked tokens don't change any bit."""
    with jax.enable_x64(True):
        y, x = rng.integers(0, CLASSES - 1, TOKENS), numbers(rng)
        directions = tuple(rng.standard_normal(a.shape) for a in x)
        ours, expected = (everything(of, wanted, name, reduction) for of in (left_out, left_out_after))
        for kept in MASKS.values():
            got = ours(kept, y, -100, np.nan, x, directions)
            close(got, expected(kept, y, 0, 0.5, x, directions), rtol=1e-9, atol=1e-10)
            jax.tree.map(np.testing.assert_array_equal, got, ours(kept, y, 3, 1e3, x, directions))


def make_mesh(shape):
    tokens, classes = shape
    axes = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("tokens", "classes"), axis_types=axes, devices=jax.devices()[: tokens * classes])


# Devices that keep 4, 1, 0 and 0 of their 4 tokens run 2, 1, 0 and 0 chunks. If each chunk sums a derivative over the
# devices, all devices run equally many chunks.


@pytest.mark.needs_jit
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("losses", (4, 2)), ("map", (4, 1)), ("log-probabilities", (4, 2)), ("map of a number", (4, 1))),
        *(("divergence", (4, 2)), ("lists", (4, 2)), ("losses", (8, 1))),
    ],
)
@modes_in_turn
@pytest.mark.in_turn(6)
def test_each_device_runs_only_chunks_with_kept_tokens(name, shape, wanted, rng):
    """Results equal those of one device, also for values that a function closes over.

    No device waits for a chunk of another device.
    """
    axes = {"token_axis": "tokens", "class_axis": "classes" if shape[1] > 1 else None}
    mesh = make_mesh(shape)
    with jax.enable_x64(True):
        y, x, kept = rng.integers(0, CLASSES - 1, 16), numbers(rng, 16), np.arange(16) < 5
        directions = tuple(rng.standard_normal(a.shape) for a in x)
        on_mesh = everything(left_out, wanted, name, "mean", on=lambda f: jce.on_mesh(f, mesh=mesh, **axes), chunk=3)
        alone = everything(left_out, wanted, name, "mean")
        for mask in (kept, kept[::-1]):
            a = (mask, y, 0, 0.5, x, directions)
            close(on_mesh(*a), alone(*a), rtol=1e-9, atol=1e-10)


@pytest.mark.needs_jit
@pytest.mark.parametrize("typed", [True, False])
def test_devices_that_communicate_in_each_step_run_equally_many_chunks(typed, rng):
    """The function sums over the tokens' mesh axis. The devices have 2, 1, 0 and 0 chunks with kept tokens."""
    h, w, kept = rng.standard_normal((16, 2)), rng.standard_normal((CLASSES, 2)), np.arange(16) < 5

    def each(h, kept, t):
        def function(x):
            return jax.lax.psum(t[0], "tokens") * x.sum()

        return jce.linear_map(function, Linear(h, w), where=kept, chunk_size=3)

    p = jax.sharding.PartitionSpec("tokens")
    split = jax.shard_map(each, mesh=make_mesh((4, 1)), in_specs=(p, p, p), out_specs=p, check_vma=typed)
    close(jax.jit(split)(h, kept, np.arange(4.0)), np.where(kept, 6 * (h @ w.T).sum(1), 0), rtol=1e-5)


# Weights of 0


@pytest.mark.holds_nan
def test_a_weight_counts_if_it_is_not_0_or_is_differentiated():
    w = jnp.array([0.0, -1.0, jnp.nan, 0.0])

    def in_a_loop(w):
        return jax.lax.scan(lambda c, w: (c, counts(w)), 0, w)[1]

    for f in (counts, jax.jit(counts), jax.vmap(counts), in_a_loop, jax.checkpoint(counts)):
        np.testing.assert_array_equal(f(w), [False, True, True, False])
        value, _ = jax.jvp(lambda w, f=f: (f(w), w), (w,), (w,))
        np.testing.assert_array_equal(value[0], True)

    def hessian_of_another(w):
        return jax.jvp(jax.grad(lambda x: jnp.where(counts(w), x * x * w, 0).sum()), (1 + w,), (1 - w,))[1]

    zeros = jnp.zeros(2)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.where(counts(zeros), x, 0).sum())(zeros), 0)
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.where(counts(w), 3 * w, 0).sum())(zeros), 3)
    np.testing.assert_array_equal(jax.grad(lambda w: hessian_of_another(w).sum())(zeros), 2)


@pytest.mark.needs_jit
@pytest.mark.parametrize("name", ["losses", "map of a number"])
@pytest.mark.slow
def test_zero_weights_without_a_derivative_cost_nothing(name, rng, monkeypatch):
    """As many chunks run as with a mask of the same tokens. If the weights are differentiated, all chunks run."""
    steps = []

    def counted(step):
        def counting(*arguments):
            jax.debug.callback(lambda: steps.append(1))
            return step(*arguments)

        return counting

    over = chunks.over_kept
    monkeypatch.setattr(chunks, "over_kept", lambda step, *rest: over(counted(step), *rest))
    y, x = rng.integers(0, CLASSES, TOKENS), [a.astype(np.float32) for a in numbers(rng)]

    def loss(h, kept, a, t):
        return FUNCTIONS[name](lambda f: f, y, None, Linear(h, x[1]), a, t, where=kept, reduction="sum", chunk_size=2)

    def taken(program, *arguments):
        jax.block_until_ready(program(x[0], *arguments, x[-1]))
        jax.effects_barrier()
        taken = len(steps)
        steps.clear()
        return taken

    jax.clear_caches()
    few = (np.arange(TOKENS) % 4 == 1).astype(np.float32)
    for program in (jax.jit(loss), jax.jit(jax.grad(loss))):
        assert taken(program, few > 0, None) == taken(program, None, few) == 2
        assert taken(program, few < 2, None) == taken(program, None, 1 + few) == 6
        assert taken(program, few < 0, None) == taken(program, None, 0 * few) == 0
    assert taken(jax.jit(jax.grad(loss, 2)), None, few) == 6
    jax.clear_caches()


@pytest.mark.holds_nan
@pytest.mark.needs_jit
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"chunk_size": 2}], ids=str)
@pytest.mark.in_turn(3)
def test_an_eager_gradient_has_no_nan_from_a_masked_token(options):
    """Outside of jit, `jax.debug_nans` looks for NaNs after each operation."""
    h, a, where = jnp.ones((4, 3)).at[1].set(jnp.nan), jnp.ones(4).at[1].set(jnp.nan), np.arange(4) != 1

    def total(h, a):
        x = jce.Linear(h, np.eye(5, 3, dtype=np.float32))
        return jce.linear_map(lambda a, x: a * jce.entropy_with_logits(x), a, x, where=where, **options).sum()

    with jax.debug_nans(True):
        gradients = jax.grad(total, (0, 1))(h, a)
    assert all(np.isfinite(g).all() and not g[1].any() for g in gradients)
