"""Heads that are functions: all `linear_*` functions, nestings and modes agree with dense logits."""

import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jce
from tests.optimized_jit import optimized_jit

B, S, D, N = 3, 20, 8, 50
ce = jce.cross_entropy_with_integer_labels


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_product(x, kernel, scale):
    return (x * scale) @ kernel


scaled_product.defvjp(
    lambda x, kernel, scale: ((x * scale) @ kernel, (x, kernel)),
    lambda scale, kept, ct: (scale * ct @ kept[1].T, scale * kept[0].reshape(-1, D).T @ ct.reshape(-1, N)),
)


def normed(h, gain):
    return h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) * gain


def loosely(head):
    """Allow promotion inside the head: these tests forbid it, but users' heads need it."""

    def called(h):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return head(h)

    return called


HEADS = {  # functions of parameters that return a function of hidden states
    "a matrix": lambda p: lambda h: h @ p["kernel"],
    "an embedding": lambda p: lambda h: jnp.einsum("bsd,vd->bsv", h, p["kernel"].T) * D**-0.5,
    "low-rank": lambda p: lambda h: h @ jax.lax.stop_gradient(p["kernel"]) + (h @ p["a"]) @ p["b"],
    "normed and capped": lambda p: lambda h: 5 * jnp.tanh(normed(h, p["gain"]) @ p["kernel"] / 5),
    "two layers": lambda p: lambda h: jax.nn.gelu(h @ p["square"]) @ p["kernel"] + p["bias"],
    "of one state": lambda p: jax.vmap(jax.vmap(lambda h: p["kernel"].T @ h)),
    "partial": lambda p: jax.tree_util.Partial(lambda kernel, h: h @ kernel, p["kernel"]),
    "int8": lambda p: lambda h: (h @ jnp.round(8 * jax.lax.stop_gradient(p["kernel"])).astype(jnp.int8)) * p["scale"],
    "checkpointed": lambda p: jax.checkpoint(lambda h: normed(h, p["gain"]) @ p["kernel"]),
    "a scan": lambda p: lambda h: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["squares"])[0] @ p["kernel"],
}


HEADS = {name: lambda p, make=make: loosely(make(p)) for name, make in HEADS.items()}


@pytest.fixture
def problem(rng):
    shapes = {"kernel": (D, N), "a": (D, 2), "b": (2, N), "gain": (D,), "square": (D, D), "bias": (N,), "scale": (N,)}
    shapes["squares"] = (2, D, D)
    parameters = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    h = jnp.asarray(rng.standard_normal((B, S, D)), jnp.float32)
    where = jnp.asarray(rng.uniform(size=(B, S)) < 0.6)
    return jnp.asarray(rng.integers(0, N, (B, S)), jnp.int32), h, parameters, where


def dense_mean(loss, where):
    return jnp.where(where, loss, 0).sum() / where.sum().astype(loss.dtype)


def close(got, expected, rtol=2e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max() + 1e-3))


def custom(p):
    return lambda h: scaled_product(h, p["kernel"], 0.5)


@pytest.mark.parametrize("name", [*HEADS, "custom"])
@pytest.mark.slow
def test_first_and_second_derivatives(name, problem):
    """Derivatives of a mean over kept tokens; masked tokens hold NaN. A custom_vjp rule has no second derivative."""
    y, h, parameters, where = problem
    bad = 1e30 if jax.config.jax_debug_nans else np.nan
    options = {"where": where, "chunk_size": 16, "z_loss": 1e-2, "label_smoothing": 0.1}
    make = HEADS.get(name, custom)

    def ours(h, p):
        return jce.linear_cross_entropy(y, jnp.where(where[..., None], h, bad), make(p), **options)

    def dense(h, p):
        return dense_mean(ce(y, make(p)(h), z_loss=1e-2, label_smoothing=0.1), where)

    def derivatives(loss):
        gradient = jax.value_and_grad(loss, (0, 1))
        second = name != "custom"
        return jax.jit(lambda h, p: jax.jvp(gradient, (h, p), (h, p)) if second else gradient(h, p))

    close(derivatives(ours)(h, parameters), derivatives(dense)(h, parameters), 2e-5)


@pytest.mark.slow
def test_eager_gradients_do_not_accumulate_programs(problem):
    y, h, p, _ = problem
    client = jax.devices()[0].client
    gradient = jax.grad(lambda h: jce.linear_cross_entropy(y, h, lambda h: h @ p["kernel"]))

    def programs():
        gradient(h)
        gc.collect()
        return len(client.live_executables())

    programs()
    assert programs() == programs()


@pytest.mark.wide
def test_every_linear_function_accepts_a_function_as_head(problem):
    y, h, p, where = problem
    head, teacher = HEADS["normed and capped"](p), 0.5 * p["kernel"].T
    x, logits = jce.Linear(h, head), head(h)
    labels = jnp.stack([y, (y + 1) % N], -1)
    probs, twice = jnp.full(labels.shape, 0.25), jnp.full((B, S), 2.0)

    @jax.jit
    def found():
        return [
            jce.linear_log_probs(y, x).log_prob,
            jce.linear_log_probs(labels, h, head, temperature=2.0).log_prob,
            jce.linear_cross_entropy(y, x, reduction="none", weights=jnp.where(where, 2.0, 0.0)),
            jce.linear_cross_entropy(labels, h, head, label_probs=probs, reduction="none"),
            jce.linear_cross_entropy(y, h, head, temperature=twice, logit_soft_cap=3.0, reduction="none"),
            jce.linear_cross_entropy(y, h, head, reduction="none", chunk_size=16, batch_invariant=True),
            jce.linear_kl_divergence(jce.Linear(h, teacher), x, reduction="none"),
            jce.linear_kl_divergence(x, jce.Linear(2 * h, head), reduction="none"),
            jce.linear_map(lambda y, x: x[y], y, x),
            jce.linear_map(lambda a, b: (a * b).sum(), x, jce.Linear(h, teacher)),
        ]

    one_of_k = jax.nn.one_hot(labels, N).mean(-2) / 2
    expected = [
        -ce(y, logits),
        -jnp.stack([ce(labels[..., k], logits / 2) for k in range(2)], -1),
        jnp.where(where, 2 * ce(y, logits), 0),
        -(one_of_k * jax.nn.log_softmax(logits)).sum(-1),
        ce(y, 3 * jnp.tanh(logits / 3) / 2),
        ce(y, logits),
        jce.kl_divergence_with_logits(h @ teacher.T, logits),
        jce.kl_divergence_with_logits(logits, head(2 * h)),
        jnp.take_along_axis(logits, y[..., None], -1)[..., 0],
        (logits * (h @ teacher.T)).sum(-1),
    ]
    close(found(), expected, 1e-5)


@pytest.mark.wide
def test_a_model_that_returns_a_linear(problem):
    """A Linear passes through jit and grad: it is a pytree of the states and the arrays that the head closes over."""
    y, h, p, _ = problem

    @jax.jit
    def model(h, p):
        return jce.Linear(2 * h, HEADS["low-rank"](p))

    def loss(h, p):
        return jce.linear_cross_entropy(y, model(h, p))

    close(jax.grad(loss, (0, 1))(h, p), jax.grad(lambda h, p: ce(y, HEADS["low-rank"](p)(2 * h)).mean(), (0, 1))(h, p))
    x = model(h, p)
    calls = []
    jce.Linear(h, lambda h: (calls.append(h.shape), h @ p["kernel"])[1])
    assert calls == [(1, 1, D)]  # traced once, for one token
    assert jax.tree.structure(x) == jax.tree.structure(jax.tree.map(lambda a: a, x))


def test_a_linear_that_is_indexed_and_capped(problem):
    """Next-token loss and gradient for a Linear that was indexed and got a soft cap."""
    y, h, p, where = problem

    def ours(h, p):
        x = jce.Linear(h, HEADS["two layers"](p)).astype(jnp.float32)[:, :-1]
        x = dataclasses.replace(x, logit_soft_cap=2.0)
        return jce.linear_cross_entropy(y[:, 1:], x, where=where[:, 1:], chunk_size=4)

    def dense(h, p):
        x = HEADS["two layers"](p)(h)[:, :-1]
        return dense_mean(ce(y[:, 1:], 2 * jnp.tanh(x / 2)), where[:, 1:])

    close(*(jax.jit(jax.value_and_grad(f, (0, 1)))(h, p) for f in (ours, dense)), 1e-5)


def test_settings_while_a_linear_is_made(problem):
    """The head is traced when the Linear is made, so JAX's settings at that time also apply to the loss."""
    _, h, p, _ = problem
    with jax.default_matmul_precision("float32"):
        x = jce.Linear(h, lambda h: h @ p["kernel"])
    (product,) = [e for e in x.head.jaxpr.eqns if e.primitive is jax.lax.dot_general_p]
    assert {*product.params["precision"]} == {jax.lax.Precision.HIGHEST}


def test_a_callable_with_a_shape_and_a_dtype(problem):
    """A module with a shape and a dtype, such as tunix' Einsum, is a function. With `ndim` as well, it is an array."""
    y, h, p, _ = problem

    class Einsum:
        shape, dtype = (D, N), jnp.float32

        def __call__(self, h):
            return jnp.einsum("...d,dn->...n", h, p["kernel"])

    class Weight(Einsum):
        ndim = 2

    close(jce.linear_cross_entropy(y, h, Einsum()), ce(y, h @ p["kernel"]).mean())
    assert [jce.Linear(h, head).of_function for head in (Einsum(), Weight())] == [True, False]


@pytest.mark.slow
def test_nestings(problem):
    """A vmap over rows, a vmap over parameters, a scan, one token alone, and no tokens."""
    y, h, p, _ = problem
    kernels = jnp.stack([p["kernel"], 2 * p["kernel"]])

    def loss(y, h, kernel):
        return jce.linear_cross_entropy(y, h, lambda h: h @ kernel, chunk_size=8)

    def dense(y, h, kernel):
        return ce(y, h @ kernel).mean()

    def all_of(loss):
        gradient = jax.value_and_grad(loss, (1, 2))
        return [
            jax.vmap(gradient, (0, 0, None))(y, h, p["kernel"]),
            jax.vmap(gradient, (None, None, 0))(y, h, kernels),
            jax.lax.scan(lambda total, yh: (total + loss(*yh, p["kernel"]), gradient(*yh, p["kernel"])), 0.0, (y, h)),
            gradient(y[0, 0], h[0, 0], p["kernel"]),
        ]

    close(jax.jit(lambda: all_of(loss))(), jax.jit(lambda: all_of(dense))(), 1e-5)
    assert loss(y[:, :0], h[:, :0], p["kernel"]) == 0


@pytest.mark.needs_jit
@pytest.mark.slow
def test_costs():
    """A function as head needs at most 1.2 times the memory of an array head.

    If the kernel is frozen and other parameters are trained, no operation makes an array of the kernel's size.
    """
    tokens, d, n = 1024, 64, 8192
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((4, tokens // 4, d), (n, d), (d, 4), (4, n))]
    y = jnp.zeros((4, tokens // 4), int)

    def compiled(loss, *wrt):
        return optimized_jit(jax.value_and_grad(loss, wrt)).lower(*shapes).compile()

    matrix = compiled(lambda h, w, *_: jce.linear_cross_entropy(y, h, w), 0, 1)
    function = compiled(
        lambda h, w, *_: jce.linear_cross_entropy(y, h, lambda h: jnp.einsum("bsd,vd->bsv", h, w)), 0, 1
    )
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (matrix, function)]
    assert sizes[1] < 1.2 * sizes[0]

    def low_rank(h, w, a, b):
        return jce.linear_cross_entropy(y, h, lambda h: h @ w.T + (h @ a) @ b)

    text = compiled(low_rank, 0, 2, 3).as_text()
    made = re.findall(rf"= f32\[(?:{n},{d}|{d},{n})\]\S* ([a-z-]+)\(", text)
    assert {*made} <= {"parameter", "get-tuple-element", "bitcast"}


def test_gradients_of_bfloat16_arrays_are_summed_in_float32(rng):
    """The gradient equals that of an array head. A bfloat16 sum over many tokens would be off by a few percent.

    Gradients are returned in the arrays' own dtypes.
    """
    h, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((4096, 4), (8, 4)))
    y = jnp.zeros(4096, int)

    def gradient(head):
        return jax.jit(jax.grad(lambda w: jce.linear_cross_entropy(y, h, head(w), chunk_size=8)))(w)

    got = gradient(lambda w: lambda h: jnp.matmul(h, w.T, preferred_element_type=jnp.float32))
    expected = gradient(lambda w: w)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(*map(np.float32, (got, expected)), rtol=1e-2, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_half_precision_logits_warn(problem):
    y, h, p, _ = problem
    with pytest.raises(UserWarning, match=r"head returns bfloat16 logits.*preferred_element_type"):
        jce.linear_cross_entropy(y, h, lambda h: (h @ p["kernel"]).astype(jnp.bfloat16))


def test_this_warning_shows_the_callers_line(problem):
    y, h, p, _ = problem

    def head(h):
        return (h @ p["kernel"]).astype(jnp.bfloat16)

    def loss(h):
        return jce.linear_cross_entropy(y, h, head)

    for call in (lambda h: jce.Linear(h, head), loss, jax.grad(loss)):
        with pytest.warns(UserWarning, match="head returns bfloat16 logits") as warned:
            call(h)
        assert [w.filename for w in warned] == [__file__]


def test_a_head_is_not_kept_alive(problem):
    y, h, p, _ = problem

    class Head:
        def __call__(self, h):
            return h @ p["kernel"]

    def used():
        head = Head()
        jax.grad(lambda h: jce.linear_cross_entropy(y, h, head))(h)
        return weakref.ref(head)

    gone = used()
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_devices(problem):
    """Tokens are split by XLA (Auto axes), or by the caller in a shard_map."""
    y, h, p, _ = problem
    y, h = y[:, :16].reshape(12, 4), h[:, :16].reshape(12, 4, D)
    mesh = jax.make_mesh((4, 2), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)

    def head(p):
        return loosely(lambda h: jnp.where(jnp.arange(N) < 40, jax.nn.relu(h + p["gain"]) @ p["kernel"], -3.0))

    def loss(h, p):
        return jce.linear_cross_entropy(y, h, head(p), chunk_size=4)

    def inside(h, p):
        def part(y, h, p):
            return jax.lax.psum(jce.linear_cross_entropy(y, h, head(p), chunk_size=4, reduction="sum"), "data") / 48

        return jax.shard_map(part, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P())(y, h, p)

    expected = jax.jit(jax.value_and_grad(lambda h, p: ce(y, head(p)(h)).mean(), (0, 1)))(h, p)
    close(jax.jit(jax.value_and_grad(inside, (0, 1)))(h, p), expected, 1e-5)
    with jax.set_mesh(mesh):
        split = jax.device_put(h, jax.sharding.NamedSharding(mesh, P("data")))
        close(jax.jit(jax.value_and_grad(loss, (0, 1)))(split, p), expected, 1e-5)


@pytest.mark.parametrize("axes", [("data", None), (None, "stage"), (("data", "stage"), None)])
def test_on_mesh_rejects_a_function_as_head(problem, axes):
    y, h, p, _ = problem
    p = {"gain": p["gain"].mean(), "kernel": p["kernel"]}  # a number can't be split
    mesh = jax.make_mesh((4, 2), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
    split = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis=axes[0], class_axis=axes[1])
    with pytest.raises(ValueError, match=r"a head that is a function is traced with whole arrays.*jax.shard_map"):
        split(y[0, :8], h[0, :8], loosely(lambda h: (h + p["gain"]) @ p["kernel"]))


def test_labels_may_vary_over_more_mesh_axes_than_states(problem):
    """Arrays vary over more mesh axes in the loop than in the trace, except those that the head makes (by arange)."""
    y, h, p, _ = problem
    y, h = jnp.stack([y[0, :8], y[1, :8]]), h[0, :8]
    mesh = jax.make_mesh((2, 4), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)

    def head(p):
        return loosely(lambda h: h @ p["kernel"] + jnp.where(jnp.arange(N) < 40, 0.0, -3.0))

    def loss(h, p):
        def part(y, h, p):
            total = jce.linear_cross_entropy(y[0], h, head(p), chunk_size=1, reduction="sum")
            return jax.lax.psum(total, ("stage", "data"))

        specs = (P("stage", "data"), P("data"), P())
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())(y, h, p)

    expected = jax.jit(jax.value_and_grad(lambda h, p: sum(ce(labels, head(p)(h)).sum() for labels in y), (0, 1)))(h, p)
    close(jax.jit(jax.value_and_grad(loss, (0, 1)))(h, p), expected, 1e-5)


def dropped(h):
    return h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape).astype(h.dtype)


def printed(h):
    jax.debug.print("{}", h)
    return h


def of_a_mapped_head(y, h, w):
    x = jax.vmap(lambda w: jce.Linear(h, lambda h: h @ w))(jnp.stack([w, w]))
    return jce.linear_cross_entropy(jnp.stack([y, y]), x)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda y, h, w: jce.linear_cross_entropy(y, h, lambda h: h.sum()), r"head must return floating.*float32\[\]"),
        (lambda y, h, w: jce.linear_log_probs(y, h, lambda h: (h @ w, 1)), r"head must return floating"),
        (lambda y, h, w: jce.linear_log_probs(y, h, lambda h: h[..., :0]), r"head must return floating"),
        (lambda y, h, w: jce.Linear(h, lambda h: (h @ w).astype(int)), r"Linear: head must return floating.*int32"),
        (lambda y, h, w: jce.linear_cross_entropy(y, h, lambda h: dropped(h) @ w), r"must not draw.*get the same"),
        (lambda y, h, w: jce.Linear(h, lambda h: printed(h) @ w), r"head must not have a side effect.*DebugEffect"),
        (lambda y, h, w: jce.linear_cross_entropy(y, h, lambda h: h @ w, jnp.zeros(N)), r"adds its own bias"),
        (lambda y, h, w: jce.Linear(h, lambda h: h @ w, jnp.zeros(N)), r"adds its own bias"),
        (lambda y, h, w: jce.linear_cross_entropy(y, jce.Linear(h, w.T), w.T), r"stands for hidden, head.*got head"),
        (lambda y, h, w: jce.Linear(None, lambda h: h @ w), r"Linear: hidden must be an array.*got hidden: NoneType"),
        (lambda y, h, w: jce.Linear(h.astype(complex), lambda h: h @ w), r"Linear: hidden must be real.*complex"),
        (lambda y, h, w: jce.linear_log_probs(y, h), r"head must be \[n, d\], or a function.*has not been replaced"),
        (lambda y, h, w: of_a_mapped_head(y, h, w), r"with which the head was traced.*must not return a Linear"),
        (
            lambda y, h, w: jce.linear_kl_divergence(jce.Linear(h, w.T[:9]), jce.Linear(h, lambda h: h @ w)),
            r"same classes.*p.head: float32\[9,8\], q.head: float32\[50\]",
        ),
    ],
)
def test_errors(problem, call, text):
    y, h, p, _ = problem
    with pytest.raises((TypeError, ValueError), match=text):
        call(y, h, p["kernel"])
