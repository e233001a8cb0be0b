"""Head functions on a mesh: results equal those on one device in every mode, without unnecessary communication."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.hlo import collectives
from jce import Linear
from tests.test_devices import close, make_mesh, second_order

pytestmark = pytest.mark.needs_jit
AXES = {"token_axis": "tokens", "class_axis": "classes"}
ce = jce.cross_entropy_with_integer_labels


def policy(axis_name):
    """A clipped-ratio loss of one token with an entropy bonus, at a temperature that all tokens share."""

    def loss(y, advantage, x, t):
        log_prob, entropy = -ce(y, x / t, axis_name=axis_name), jce.entropy_with_logits(x, axis_name=axis_name)
        ratio = jnp.exp(log_prob + 3)
        return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage) - 0.1 * entropy

    return loss


# Functions of `on` (which puts a function on the mesh), the class axis, labels, an advantage per token, two `Linear`s,
# and a temperature
LOSSES = {
    "cross-entropy": lambda on, axis, y, a, p, q, t: on(jce.linear_cross_entropy)(y, q.hidden, q.head, chunk_size=3),
    "log-probabilities": lambda on, axis, y, a, p, q, t: sum(
        (a * x).sum() for x in on(jce.linear_log_probs)(y, q.hidden, q.head, chunk_size=3)
    ),
    "divergence": lambda on, axis, y, a, p, q, t: on(jce.linear_kl_divergence)(
        p, q, weights=a, reduction="sum", temperature=t, chunk_size=3
    ),
    "each divergence": lambda on, axis, y, a, p, q, t: (
        a * on(jce.linear_kl_divergence)(p, q, reduction="none", chunk_size=3)
    ).sum(),
    "map": lambda on, axis, y, a, p, q, t: on(jce.linear_map)(
        policy(axis), y, a, q, shared=t, where=y > 0, reduction="mean", chunk_size=3
    ),
    "map of each": lambda on, axis, y, a, p, q, t: on(jce.linear_map)(
        policy(axis), y, a, Linear(q.hidden, q.head, logit_soft_cap=2 * t), shared=t, chunk_size=3
    ).sum(),
}


def arguments(rng, tokens=16, widths=(3, 5), n=24, dtype=np.float64):
    p, q = (
        Linear(rng.standard_normal((tokens, d)).astype(dtype), rng.standard_normal((n, d)).astype(dtype))
        for d in widths
    )
    return rng.integers(0, n, tokens), (rng.standard_normal(tokens).astype(dtype), p, q, np.array(1.5, dtype))


def test_derivative_with_respect_to_a_zero_weight(rng):
    """The derivative is the token's loss, also if another device has the label's class, and 0 for an invalid label."""
    y, h, w = np.arange(4) * 3, rng.standard_normal((4, 3)), rng.standard_normal((8, 3))
    weights = np.float64([1, 0, 0, 0])

    def gradient(function):
        return jax.jit(jax.grad(lambda weights: function(y, h, w, weights=weights, reduction="sum")))(weights)

    split = jce.on_mesh(jce.linear_cross_entropy, mesh=make_mesh((2, 4)), **AXES)
    got, expected = map(gradient, (split, jce.linear_cross_entropy))
    close(got, expected)
    assert list(expected == 0) == [False, False, False, True]


def skip_if_jax_cannot(name):
    if "map" in name and jax.__version_info__ < (0, 9):
        pytest.skip("this JAX can't vmap a psum in a shard_map")


@pytest.mark.parametrize(("name", "shape"), list(zip(LOSSES, [(2, 4), (4, 2)] * 3, strict=True)))
@pytest.mark.slow
def test_results_equal_those_on_one_device(name, shape, rng):
    skip_if_jax_cannot(name)
    y, numbers = arguments(rng)
    numbers, tree = jax.tree.flatten(numbers)
    directions = tuple(rng.standard_normal(x.shape) for x in numbers)

    def of(on, axis):
        return second_order(
            lambda *x: LOSSES[name](on, axis, y, *jax.tree.unflatten(tree, x)), tuple(range(len(numbers)))
        )

    with jax.enable_x64(True):
        got = of(lambda f: jce.on_mesh(f, mesh=make_mesh(shape), **AXES), "classes")(tuple(numbers), directions)
        expected = of(lambda f: f, None)(tuple(numbers), directions)
    close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_tokens_split_over_two_mesh_axes(rng):
    """Values, and gradients with respect to all float arguments, with different numbers of masked tokens per device."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "stage", "classes"), axis_types=(AxisType.Auto,) * 3)
    axes = {"mesh": mesh, "token_axis": ("data", "stage"), "class_axis": "classes"}
    y, (a, p, q, t) = arguments(rng)
    kept = np.arange(len(y)) % 5 != 1
    names = ["log-probabilities", "divergence", *(["map"] if jax.__version_info__ >= (0, 9) else [])]

    def weighted(on, a, p, q, t):
        weights = jnp.square(a)
        return on(jce.linear_cross_entropy)(
            y, q.hidden, q.head, weights=weights, where=kept, label_smoothing=0.1, chunk_size=3
        )

    def results(on, axis):
        losses = [functools.partial(LOSSES[name], on, axis, y) for name in names]
        losses.append(functools.partial(weighted, on))
        return jax.jit(lambda *x: [jax.value_and_grad(f, (0, 1, 2, 3))(*x) for f in losses])

    with jax.enable_x64(True):
        expected = results(lambda f: f, None)(a, p, q, t)
        tokens = NamedSharding(mesh, P(("data", "stage")))
        a, p, q = (jax.tree.map(lambda x: jax.device_put(x, tokens) if len(x) == len(y) else x, x) for x in (a, p, q))
        split = results(lambda f: jce.on_mesh(f, **axes), "classes")
        close(split(a, p, q, t), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.in_turn(18)
def test_communication(name, shape):
    """Nothing is gathered. The loop sends a few numbers per token. After the loop, each gradient is summed once."""
    skip_if_jax_cannot(name)
    tokens, widths, n, chunk = 256, (12, 16), 1024, 3
    mesh = make_mesh(shape)

    def abstract(shape, axis=None, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(axis) if axis else P()))

    p, q = (Linear(abstract((tokens, d), "tokens"), abstract((n, d), "classes")) for d in widths)
    given = abstract((tokens,), "tokens", np.int32), abstract((tokens,), "tokens"), p, q, abstract(())

    def loss(y, *numbers):
        return LOSSES[name](lambda f: jce.on_mesh(f, mesh=mesh, **AXES), "classes", y, *numbers)

    sent = collectives(jax.jit(jax.value_and_grad(loss, (1, 2, 3, 4))).lower(*given).compile().as_text())
    assert sent
    assert {c.kind for c in sent} <= {"all-reduce"}
    local_tokens, local_n = tokens // shape[0], n // shape[1]
    most = max(widths) * max(local_tokens, local_n)
    for _, size, in_loop in sent:
        assert size <= (chunk if in_loop else most), (size, in_loop)
    for d in widths[1:]:
        whole_head = [size for _, size, in_loop in sent if not in_loop and size == local_n * d]
        assert len(whole_head) == (1 if shape[0] > 1 else 0)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.slow
def test_inside_a_users_shard_map(check_vma, rng):
    """Derivatives taken outside the shard_map are correct with and without check_vma."""
    skip_if_jax_cannot("map")
    y, (a, _, q, t) = arguments(rng)

    def whole(h, w, t):
        return LOSSES["map"](lambda f: f, None, y, a, None, Linear(h, w), t)

    def split(h, w, t):
        def of_part(y, a, h, w, t):
            x = Linear(h, w)
            losses, kept = jce.linear_map(
                lambda y, a, x, t: (policy("classes")(y, a, x, t), y > 0),
                y,
                a,
                x,
                shared=t,
                where=y > 0,
                reduction="sum",
                chunk_size=3,
                axis_name="classes",
            )
            return jax.lax.psum(losses, "tokens") / jax.lax.psum(kept, "tokens")

        specs = P("tokens"), P("tokens"), P("tokens"), P("classes"), P()
        return jax.shard_map(of_part, mesh=make_mesh((2, 4)), in_specs=specs, out_specs=P(), check_vma=check_vma)(
            y, a, h, w, t
        )

    numbers = q.hidden, q.head, t
    directions = tuple(rng.standard_normal(np.shape(x)) for x in numbers)
    with jax.enable_x64(True):
        close(*(second_order(f, (0, 1, 2))(numbers, directions) for f in (split, whole)), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_tokens_split_by_type(rng):
    """Tokens split by type stay split. A temperature has the same derivative, whether shared or closed over."""
    skip_if_jax_cannot("map")
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(AxisType.Explicit,))
    y, (a, _, q, t) = arguments(rng, dtype=np.float32)
    with jax.set_mesh(mesh):
        y, a, h = (jax.device_put(x, NamedSharding(mesh, P("tokens"))) for x in (y, a, q.hidden))

        def shared(h, w, t):
            return LOSSES["map"](lambda f: f, None, y, a, None, Linear(h, w), t)

        def closed(h, w, t):
            return jce.linear_map(
                lambda y, a, x: policy(None)(y, a, x, t),
                y,
                a,
                Linear(h, w),
                where=y > 0,
                reduction="mean",
                chunk_size=3,
            )

        got = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(h, q.head, t) for f in (shared, closed)]
        assert jax.typeof(got[0][1][0]).sharding.spec[0] == "tokens"
    y, a = np.asarray(y), np.asarray(a)
    expected = jax.value_and_grad(shared, (0, 1, 2))(q.hidden, q.head, t)
    for x in got:
        close(jax.device_get(x), jax.device_get(expected), rtol=2e-5, atol=2e-5)


def test_tokens_split_by_type_inside_a_shard_map_over_the_classes(rng):
    """The value is correct if the caller splits the classes, and types split the tokens over another mesh axis.

    Gradients aren't tested: JAX 0.8 to 0.12 can't lower a gradient through two nested `shard_map`s."""
    mesh = jax.make_mesh((2, 4), ("tokens", "classes"), axis_types=(AxisType.Explicit,) * 2)
    y, (_, _, q, _) = arguments(rng, dtype=np.float32)

    def loss(h, w):
        def of_part(h, w):
            return jce.linear_cross_entropy(y, h, w, axis_name="classes", chunk_size=3)

        specs = P(), P("classes")
        return jax.shard_map(of_part, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"classes"})(h, w)

    with jax.set_mesh(mesh):
        parts = zip((q.hidden, q.head), (P("tokens"), P("classes")), strict=True)
        got = jax.jit(loss)(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in parts))
    close(jax.device_get(got), jce.linear_cross_entropy(y, q.hidden, q.head), rtol=1e-5, atol=0)


OF_WIDTHS = {
    "cross-entropy": jce.linear_cross_entropy,
    "divergence": lambda y, h, w: jce.linear_kl_divergence(Linear(h, w), Linear(2 * h, w)),
    "map": lambda y, h, w: jce.linear_map(ce, y, Linear(h, w), reduction="mean"),
}


@pytest.mark.parametrize("name", OF_WIDTHS)
@pytest.mark.parametrize("head_is_split", [True, False])
@pytest.mark.slow
def test_hidden_states_split_by_type_over_their_width(name, head_is_split, rng):
    """Results equal those without a mesh, and gradients are placed like arguments, whether or not the head is split."""
    y, (h, w) = rng.integers(0, 8, 6), (rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (8, 4)))
    mesh = jax.make_mesh((2,), ("width",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    specs = P(None, "width"), P(None, "width" if head_is_split else None)
    step = jax.jit(jax.value_and_grad(lambda h, w: OF_WIDTHS[name](y, h, w), (0, 1)))
    expected = step(h, w)
    with jax.set_mesh(mesh):
        got = step(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((h, w), specs, strict=True)))
    assert tuple(jax.typeof(g).sharding.spec for g in got[1]) == specs
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


# Batches that jax.vmap splits over another mesh axis


def split_rows(check_vma):
    def of_rows(y, x):
        return jce.cross_entropy_with_integer_labels(y, x, axis_name="classes")

    specs = {"in_specs": (P("tokens"), P("tokens", "classes")), "out_specs": P("tokens")}
    return lambda mesh: jax.shard_map(of_rows, mesh=mesh, check_vma=check_vma, **specs)


def mean(y, h, w, where):
    return jce.linear_cross_entropy(y, h, w, where=where)


# By name: a function that takes a mesh and returns a loss, and the same loss without a mesh
SPLIT_BATCHES = {
    "cross-entropy": (
        lambda mesh: (
            lambda y, h, w, where: jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, **AXES)(y, h, w, where=where)
        ),
        mean,
    ),
    "map": (
        lambda mesh: (
            lambda y, h, w, where: jce.on_mesh(jce.linear_map, mesh=mesh, **AXES)(
                lambda y, x: ce(y, x, axis_name="classes"), y, Linear(h, w), where=where, reduction="mean"
            )
        ),
        mean,
    ),
    "rows": (
        lambda mesh: lambda y, h, w, where: split_rows(False)(mesh)(y, h @ w.T).sum(where=where),
        lambda y, h, w, where: ce(y, h @ w.T).sum(where=where),
    ),
}


@pytest.mark.parametrize("own_heads", [False, True], ids=["one head", "heads"])
@pytest.mark.parametrize("name", SPLIT_BATCHES)
@pytest.mark.slow
def test_a_batch_split_by_spmd_axis_name(name, own_heads, rng):
    """Values, gradients of the batch's sum, and gradients of each element, with a shared head or one per element."""
    mesh = jax.make_mesh((2, 2, 2), ("batch", "tokens", "classes"), axis_types=(AxisType.Auto,) * 3)
    of_mesh, whole = SPLIT_BATCHES[name]
    y, where = rng.integers(0, 8, (4, 6)), rng.random((4, 6)) < 0.7
    h, w = (rng.standard_normal(s).astype(np.float32) for s in ((4, 6, 3), (4, 8, 3) if own_heads else (8, 3)))

    def results(f, **split):
        axes = (0, 0, 0 if own_heads else None, 0)

        def total(h, w):
            return jax.vmap(f, axes, **split)(y, h, w, where).sum()

        values = jax.vmap(f, axes, **split)(y, h, w, where)
        if jax.__version_info__ < (0, 10):  # which can't batch a gradient without check_vma
            return values
        return values, jax.grad(total, (0, 1))(h, w), jax.vmap(jax.grad(f, (1, 2)), axes, **split)(y, h, w, where)

    got, expected = jax.jit(lambda: results(of_mesh(mesh), spmd_axis_name="batch"))(), results(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_a_batch_split_by_spmd_axis_name_over_a_checked_shard_map():
    mesh = jax.make_mesh((2, 2, 2), ("batch", "tokens", "classes"), axis_types=(AxisType.Auto,) * 3)
    of_rows = jax.vmap(split_rows(True)(mesh), spmd_axis_name="batch")
    with pytest.raises(ValueError, match=r"integer_labels: .*got axis_name='classes'.*\['batch'\].* check_vma=False"):
        of_rows(np.zeros((4, 6), int), np.zeros((4, 6, 8), np.float32))


def test_errors():
    mesh = make_mesh((2, 4))
    x = Linear(np.ones((4, 2), np.float32), np.ones((8, 2), np.float32))
    with pytest.raises(TypeError, match=r"on_mesh: function must be one of jce.linear_cross_entropy, .*got <function"):
        jce.on_mesh(jce.entropy, mesh=mesh, **AXES)
    with pytest.raises(TypeError, match=r"linear_map: on a mesh it does not take axis_name.*=None\. Name .*"):
        jce.on_mesh(jce.linear_map, mesh=mesh, **AXES)(jnp.argmax, x, axis_name=None)
    with pytest.raises(ValueError, match=r"on_mesh: mesh must be a mesh of devices.*got mesh=None.*On one device"):
        jce.on_mesh(jce.linear_map, mesh=None, **AXES)
    for wrong in (["classes"], np.ones(2), {}, "nowhere", ("nowhere",)):
        for axis in AXES:
            with pytest.raises(
                ValueError, match=rf"on_mesh: {axis} must name axes of the mesh.*'tokens', 'classes'.*got {axis}="
            ):
                jce.on_mesh(jce.linear_map, mesh=mesh, **(AXES | {axis: wrong}))
    for classes in ("tokens", ("tokens", "classes")):
        got = re.escape(f"got token_axis='tokens' and class_axis={classes!r}")
        with pytest.raises(ValueError, match=f"on_mesh: token_axis and class_axis .* different mesh axes.*{got}"):
            jce.on_mesh(jce.linear_map, mesh=mesh, token_axis="tokens", class_axis=classes)
    with pytest.raises(ValueError, match=r"linear_map: the number of classes.*multiple of the 4 devices.*got 6"):
        jce.on_mesh(jce.linear_map, mesh=mesh, **AXES)(jnp.max, Linear(x.hidden, x.head[:6]))
    with pytest.raises(
        ValueError, match=r"linear_map: the results of function must be the same.*\['classes'\].*axis_name"
    ):
        jce.on_mesh(jce.linear_map, mesh=mesh, **AXES)(jnp.max, x)
    explicit = jax.make_mesh((4,), ("classes",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with (
        jax.set_mesh(explicit),
        pytest.raises(ValueError, match=r"linear_map: with Explicit axes, heads must not.*'classes'.*on_mesh"),
    ):
        jce.linear_map(jnp.max, Linear(x.hidden, jax.device_put(x.head, NamedSharding(explicit, P("classes")))))
