"""`linear_map`: results against dense logits in every mode, masked tokens, closed-over values, and costs."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from jce import Linear
from tests.kernels import modes
from tests.optimized_jit import optimized_jit
from tests.test_linear_cost import needed

TOKENS, CLASSES, CHUNK = 11, 7, 4
WIDTHS = {"teacher": 3, "student": 2}
ce = jce.cross_entropy_with_integer_labels


def clipped_ratio(log_prob, advantage, old):
    ratio = jnp.exp(log_prob - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)


def policy_loss(y, advantage, old, reference, x):
    return clipped_ratio(-ce(y, x), advantage, old) + 0.1 * jce.kl_divergence_with_logits(x, reference)


class Mapped(NamedTuple):
    """A function of one token, and the names of its arguments in `arrays`."""

    function: Callable
    arguments: tuple[str, ...]


def teachers_classes(classes, probs, x):
    return -(probs * jax.nn.log_softmax(x)[classes]).sum()


def of_legal_classes(y, legal, x):
    return ce(y, x, where=legal)


def logits_first(x, y):
    return jnp.tanh(x).sum() * x[y]


FUNCTIONS = {
    "label": Mapped(ce, ("labels", "student")),
    "distillation": Mapped(jce.kl_divergence_with_logits, ("teacher", "student")),
    "top-k teacher": Mapped(teachers_classes, ("classes", "probs", "student")),
    "policy": Mapped(policy_loss, ("labels", "advantages", "old", "teacher", "student")),
    "legal classes": Mapped(of_legal_classes, ("labels", "legal", "student")),
    "logits first": Mapped(logits_first, ("student", "labels")),
}


@pytest.fixture
def arrays(rng):
    """By name: the arguments with one entry per token, and the hidden states and heads of a teacher and a student."""
    labels = rng.integers(0, CLASSES, TOKENS)
    legal = rng.random((TOKENS, CLASSES)) < 0.6
    legal[np.arange(TOKENS), labels] = True
    of_tokens = {
        "labels": labels,
        "advantages": rng.standard_normal(TOKENS),
        "old": -rng.random(TOKENS),
        "classes": rng.integers(0, CLASSES, (TOKENS, 3)),
        "probs": rng.random((TOKENS, 3)),
        "legal": legal,
    }
    heads = {
        name: (rng.standard_normal((TOKENS, width)), rng.standard_normal((CLASSES, width)))
        for name, width in WIDTHS.items()
    }
    return of_tokens, heads


def whole(function, arguments, where, weights, reduction):
    """The results of `linear_map`, computed from the logits of all tokens at once."""
    x = [a.hidden @ a.head.T if isinstance(a, Linear) else a for a in arguments]
    results = jax.vmap(function)(*x)
    w = jnp.where(where, weights, 0)
    if reduction == "none":
        return w * results
    return (w * results).sum() / (w.sum() if reduction == "mean" else 1)


SECOND = ("jvp", "forward over reverse", "reverse over forward", "reverse over reverse")


@pytest.mark.parametrize(
    ("name", "reduction", "wanted"),
    [(name, ("sum", "mean", "none")[i % 3], ("value", "gradient")) for i, name in enumerate(FUNCTIONS)]
    + [pytest.param(name, "sum", SECOND, marks=pytest.mark.slow) for name in FUNCTIONS]
    + [pytest.param(name, "none", SECOND, marks=pytest.mark.slow) for name in ("distillation", "policy")],
)
@pytest.mark.in_turn(3, "wide")
def test_functions_against_dense_logits(name, reduction, wanted, arrays, rng):
    """Value, first and second derivatives with respect to hidden states, heads and weights."""
    function, names = FUNCTIONS[name]
    of_tokens, heads = arrays
    where = rng.random(TOKENS) < 0.7
    numbers = (*(x for pair in heads.values() for x in pair), rng.random(TOKENS) + 0.5)

    def of(how):
        def loss(th, tw, sh, sw, weights):
            # The inputs are computed in the same program, as in a model.
            linear = {"teacher": Linear(jnp.tanh(th), tw), "student": Linear(2 * jnp.sin(sh), sw)}
            arguments = [linear.get(name, of_tokens.get(name)) for name in names]
            cotangent = jnp.arange(1.0, TOKENS + 1) if reduction == "none" else 1
            return (how(function, arguments, where, weights, reduction) * cotangent).sum()

        return modes(loss, tuple(range(len(numbers))))

    def chunks(function, arguments, where, weights, reduction):
        return jce.linear_map(function, *arguments, where=where, weights=weights, reduction=reduction, chunk_size=CHUNK)

    directions = tuple(rng.standard_normal(x.shape) for x in numbers)
    with jax.enable_x64(True):
        got, expected = (
            jax.jit(lambda a, t, p=programs: {m: p[m](a, t) for m in wanted})(numbers, directions)
            for programs in map(of, (chunks, whole))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)


def test_pytrees_of_all_dtypes(arrays):
    """Arguments and results can be pytrees of numbers, bools and None. A mean of bools is the fraction that is True."""
    of_tokens, heads = arrays
    data = {"labels": of_tokens["labels"], "logits": (Linear(*heads["student"], logit_soft_cap=2.0), None)}

    def function(data, scale):
        x = data["logits"][0]
        return {"right": x.argmax() == data["labels"], "top": [x.argmax(), x * scale], "none": None}

    def mapped(data, reduction):
        return jce.linear_map(function, data, shared=2.0, reduction=reduction, chunk_size=CHUNK)

    each, mean = (jax.jit(mapped, static_argnums=1)(data, reduction) for reduction in ("none", "mean"))
    h, w = heads["student"]
    x = 2 * np.tanh(h @ w.T / 2)
    right = x.argmax(1) == of_tokens["labels"]
    assert (each["right"] == right).all()
    assert each["right"].dtype == bool
    assert (each["top"][0] == x.argmax(1)).all()
    np.testing.assert_allclose(each["top"][1], 2 * x, rtol=1e-5)
    assert each["none"] is None
    np.testing.assert_allclose(mean["right"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(mean["top"][1], 2 * x.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_token_axes_and_samples(rng):
    """With two token axes and a random key per token, the sampled classes are those of the dense logits."""
    h, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 3), (CLASSES, 3)))
    keys = jax.random.split(jax.random.key(0), (2, 5))
    got = jce.linear_map(jax.random.categorical, keys, Linear(h, w), chunk_size=4)
    expected = jax.vmap(jax.vmap(jax.random.categorical))(keys, jnp.asarray(h @ w.T, jnp.float32))
    assert got.shape == (2, 5)
    assert (got == expected).all()


# Masked tokens


def singular(x, scale):
    """A function that is infinite if all logits are 0, as they would be for tokens that pad a chunk with zeros."""
    return scale * jnp.log(jnp.abs(x).sum())


@pytest.mark.holds_nan
@pytest.mark.parametrize("how", ["padded chunk", "where", "weights", "all masked"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.in_turn(2)
def test_derivatives_ignore_masked_tokens(how, reduction, rng):
    """61 tokens in chunks of 16, so the last chunk is padded. Masked tokens hold NaN."""
    h, w = rng.standard_normal((61, 3)), rng.standard_normal((CLASSES, 3))
    kept = np.ones(61, bool) if how == "padded chunk" else np.arange(61) % 3 == 1
    kept &= how != "all masked"
    options = {} if how == "padded chunk" else {"weights": 1.0 * kept} if how == "weights" else {"where": kept}

    def ours(h, w, scale):
        h = jnp.where(kept[:, None], h, jnp.nan)
        return jce.linear_map(singular, Linear(h, w), shared=scale, reduction=reduction, chunk_size=16, **options).sum()

    def expected(h, w, scale):
        return (0 * scale + jax.vmap(lambda h: singular(w @ h, scale))(h[kept])).sum()

    with jax.enable_x64(True):
        for got, right in zip(
            *(jax.jit(jax.value_and_grad(f, (0, 1, 2)))(h, w, np.float64(2)) for f in (ours, expected)), strict=True
        ):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), got, right)


@pytest.mark.slow
def test_an_infinite_result_with_weight_0_adds_nothing():
    """The sum is finite, but the derivative with respect to the weight of 0 is infinite."""
    x = Linear(jnp.ones((2, 1)), jnp.zeros((3, 1)), jnp.array([0, 0, -jnp.inf]))

    def total(weights):
        return jce.linear_map(ce, jnp.array([2, 0]), x, weights=weights, reduction="sum")

    value, gradient = jax.value_and_grad(total)(jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(value, 2 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [np.inf, math.log(2)], rtol=1e-6)


def test_no_tokens_and_no_classes():
    def of(tokens, n, reduction):
        return jce.linear_map(
            jce.entropy_with_logits, Linear(jnp.ones((tokens, 2)), jnp.ones((n, 2))), reduction=reduction
        )

    assert of(0, 3, "none").shape == (0,)
    assert of(0, 3, "mean") == 0
    assert of(2, 0, "sum") == 0
    assert (
        jax.grad(lambda h: jce.linear_map(jnp.sum, Linear(h, jnp.ones((3, 2))), reduction="sum"))(jnp.ones((0, 2))) == 0
    ).all()


# Closed-over and shared values


@pytest.mark.slow
def test_traced_values_closed_over_and_shared(arrays):
    """Derivatives up to order 2 with respect to a temperature that is closed over or passed in `shared`."""
    of_tokens, heads = arrays
    x = Linear(*heads["student"])

    def closed(t):
        return jce.linear_map(lambda y, x: ce(y, x / t), of_tokens["labels"], x, reduction="mean", chunk_size=CHUNK)

    def shared(t):
        options = {"shared": t, "reduction": "mean", "chunk_size": CHUNK}
        return jce.linear_map(lambda y, x, t: ce(y, x / t), of_tokens["labels"], x, **options)

    def expected(t):
        return ce(of_tokens["labels"], jnp.asarray(heads["student"][0] @ heads["student"][1].T) / t).mean()

    with jax.enable_x64(True):
        got = [
            jax.jit(lambda t, f=f: [f(t), jax.grad(f)(t), jax.hessian(f)(t)])(1.5) for f in (closed, shared, expected)
        ]
    np.testing.assert_allclose(got[0], got[2], rtol=1e-10)
    np.testing.assert_allclose(got[1], got[2], rtol=1e-10)


TREES = {
    "one number": lambda y, x: ce(y, x),
    "a number and a bool": lambda y, x: (ce(y, x), x.argmax() == y),
    "a number and an integer": lambda y, x: (x.argmax(), ce(y, x)),
    "integers": lambda y, x: (x.argmax(), y),
    "two reals and an integer": lambda y, x: {"reals": [ce(y, x), x], "top": x.argmin()},
}


QUICK = ("a number and a bool", "mean"), ("two reals and an integer", "sum"), ("integers", "none")


@pytest.mark.parametrize(
    ("tree", "reduction"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(TREES, ["mean", "sum", "none"])
    ],
)
def test_every_result_has_a_derivative_with_respect_to_the_weights(tree, reduction, arrays):
    """Forward and reverse mode give this derivative for all reductions, even of integers and bools."""
    of_tokens, heads = arrays
    h, w = (a.astype(np.float32) for a in heads["student"])
    results = jax.vmap(TREES[tree])(of_tokens["labels"], h @ w.T)
    weights = jnp.linspace(0.5, 2, TOKENS, dtype=np.float32)

    def ours(a):
        x = Linear(h, w)
        return jce.linear_map(TREES[tree], of_tokens["labels"], x, weights=a, reduction=reduction, chunk_size=CHUNK)

    def whole(a):
        each = jax.tree.map(lambda r: a.reshape(-1, *[1] * (r.ndim - 1)) * r.astype(np.float32), results)
        if reduction == "none":
            return each
        return jax.tree.map(lambda r: r.sum(0) / (a.sum() if reduction == "mean" else 1), each)

    for mode in (jax.jacfwd, jax.jacrev):
        got, expected = (jax.jit(mode(f))(weights) for f in (ours, whole))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def limited(limit):
    """The identity with a clipped cotangent. Its rule closes over the limit."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -limit, limit),))
    return identity


@pytest.mark.needs_jit
def test_rules_that_close_over_a_traced_value():
    """A derivative rule that closes over a traced value works if results are summed.

    Otherwise, such a rule behaves as it does under `jax.lax.map` (`tests/test_plain_jax.py`).
    """
    h, w = np.ones((5, 2), np.float32), np.ones((3, 2), np.float32)

    def loss(limit, h):
        return jce.linear_map(
            lambda x: limited(limit)(x) @ jnp.arange(3, dtype=np.float32), Linear(h, w), reduction="sum", chunk_size=2
        )

    gradient = jax.grad(loss, 1)
    limit = np.float32(1.5)
    for got in (jax.jit(gradient)(limit, h), jax.vmap(gradient, (0, None))(limit[None], h)[0]):
        np.testing.assert_allclose(got, np.full((5, 2), 2.5), rtol=1e-6)


@pytest.mark.needs_jit
def test_functions_that_name_the_axis_of_a_vmap():
    """One loop runs over the tokens of all batch entries, so a function must not name the vmap's axis."""
    x = Linear(jnp.ones((2, 3, 4)), jnp.ones((5, 4)))

    def batched(function, **options):
        def of_member(h):
            return jce.linear_map(function, Linear(h, x.head), **options)

        return jax.vmap(of_member, axis_name="members")(x.hidden)

    assert (batched(jnp.sum) == 20).all()
    for function in (
        lambda x: jax.lax.psum(x.sum(), "members"),
        jax.jit(lambda x: x.astype(jnp.int32) * jax.lax.axis_index("members")),
        lambda x: jax.lax.map(lambda x: jax.lax.pmean(x, "members"), x),
    ):
        for options in ({}, {"reduction": "sum"}):
            with pytest.raises(ValueError, match=r"linear_map: .*must not name the axis.*names 'members'.*outside"):
                batched(function, **options)


@pytest.mark.slow
def test_derivatives_only_with_respect_to_weights_or_closed_over_values(arrays):
    """Heads and hidden states are not differentiated."""
    of_tokens, heads = arrays
    h, w = (a.astype(np.float32) for a in heads["student"])
    x, losses = Linear(h, w), ce(of_tokens["labels"], h @ w.T)

    def loss(weights, t):
        return jce.linear_map(
            lambda y, x: t * ce(y, x), of_tokens["labels"], x, weights=weights, reduction="sum", chunk_size=CHUNK
        )

    weights = jnp.arange(TOKENS, dtype=jnp.float32)
    for k, expected in enumerate((2 * losses, (weights * losses).sum())):
        np.testing.assert_allclose(jax.jit(jax.grad(loss, k))(weights, jnp.float32(2)), expected, rtol=1e-5)


@pytest.mark.needs_jit
@pytest.mark.slow
def test_a_symbolic_number_of_tokens(arrays):
    """One export works for any number of tokens."""
    (tokens,) = jax.export.symbolic_shape("tokens")
    of_tokens, heads = arrays

    def loss(y, h, w):
        x = Linear(h, w)
        each = jce.linear_map(lambda y, x: x.argmax().astype(y.dtype) == y, y, x, chunk_size=CHUNK)
        some = jce.linear_map(ce, y, x, where=y < 4, reduction="mean", chunk_size=CHUNK)
        return some + jce.linear_map(ce, y, x, reduction="mean", chunk_size=CHUNK), each

    program = jax.jit(jax.value_and_grad(loss, (1, 2), has_aux=True))
    arguments = [np.asarray(of_tokens["labels"], np.int32), *(np.asarray(a, np.float32) for a in heads["student"])]
    shapes = [jax.ShapeDtypeStruct((tokens, *a.shape[1:]), a.dtype) for a in arguments[:2]]
    exported = jax.export.export(program)(*shapes, jax.ShapeDtypeStruct(arguments[2].shape, np.float32))
    got, expected = exported.call(*arguments), program(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_a_changed_module_is_traced_again():
    class Scale:
        by = 1.0

        def of(self, x):
            return self.by * x.sum()

    scale, x = Scale(), Linear(jnp.ones((3, 2)), jnp.ones((4, 2)))
    assert (jce.linear_map(scale.of, x) == 8).all()
    scale.by = 2.0
    assert (jce.linear_map(scale.of, x) == 16).all()


@pytest.mark.needs_jit
def test_a_new_lambda_in_a_jit_does_not_recompile():
    traces = []

    @jax.jit
    def step(x):
        traces.append(None)
        return jce.linear_map(lambda x: x.max(), x, reduction="mean")

    x = Linear(jnp.ones((3, 2)), jnp.ones((4, 2)), logit_soft_cap=3.0)
    assert step(x) == step(x)
    assert len(traces) == 1


def test_a_shared_array_keeps_its_dtype():
    x = Linear(np.eye(2), np.eye(3, 2))
    assert jce.linear_map(lambda x, s: s, x, shared=jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.holds_nan
def test_a_zero_weight_for_a_token_with_one_nan_hidden_state(rng):
    """The token is masked, so the derivative with respect to its weight is 0. The other derivative is unchanged."""
    w, h = rng.standard_normal((3, 2)).astype(np.float32), np.float32([[1, 2], [3, 4]])

    def total(weights, bad):
        x, y = Linear(np.where([[False], [True]], bad, h), w), Linear(h, 2 * w)
        return jce.linear_map(jce.kl_divergence_with_logits, x, y, weights=weights, reduction="sum")

    got, whole = (jax.grad(total)(np.float32([1, 0]), bad) for bad in (np.float32(np.nan), np.float32(1)))
    np.testing.assert_allclose(got, [whole[0], 0], rtol=1e-6)


@pytest.mark.wide
def test_half_precision_is_summed_in_float32():
    """1,024 tokens, each in its own chunk, share a bfloat16 number. Its gradient, summed in float32, is exact."""
    x = Linear(jnp.ones((1024, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16))

    def loss(scale, reduction):
        return jce.linear_map(
            lambda x, s: s.astype(np.float32) * x[0], x, shared=scale, reduction=reduction, chunk_size=1
        ).sum()

    def closing_over_it(scale, reduction):
        return jce.linear_map(lambda x: scale * x[0].astype(jnp.bfloat16), x, reduction=reduction, chunk_size=1).sum()

    for reduction in ("sum", "none"):
        for f in (loss, closing_over_it):
            assert jax.grad(f)(jnp.ones((), jnp.bfloat16), reduction) == 1024


@pytest.mark.parametrize("of_head", [jnp.bfloat16, jnp.float32])
@pytest.mark.slow
def test_derivatives_in_half_precision(of_head, rng):
    """Derivatives with respect to hidden states and head, in both modes: dtypes, and accuracy in bfloat16."""
    numbers, directions = (
        (jnp.asarray(rng.standard_normal((7, 4)), jnp.bfloat16), jnp.asarray(rng.standard_normal((5, 4)), of_head))
        for _ in range(2)
    )
    y = np.arange(7) % 5

    def loss(hidden, head):
        x = Linear(hidden, head)
        return jce.linear_map(jce.cross_entropy_with_integer_labels, y, x, reduction="mean", chunk_size=3)

    _, tangent = jax.jvp(loss, numbers, directions)
    gradients = jax.grad(loss, (0, 1))(*numbers)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, of_head]
    wide = [tuple(x.astype(np.float32) for x in xs) for xs in (numbers, directions)]
    np.testing.assert_allclose(tangent, jax.jvp(loss, *wide)[1], rtol=0.02)
    for g, expected in zip(gradients, jax.grad(loss, (0, 1))(*wide[0]), strict=True):
        np.testing.assert_allclose(np.float32(g), expected, atol=2**-7 * np.abs(expected).max())


def test_jacobians_in_half_precision(rng):
    """Jacobians with respect to all hidden states: batches of tangents and of cotangents, with one head."""
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((3, 2), (5, 2)))

    @jax.jit
    def both(hidden):
        def each(h):
            return jce.linear_map(jax.nn.logsumexp, Linear(h, head))

        return jax.jacfwd(each)(hidden), jax.jacrev(each)(hidden)

    forward, reverse = map(np.float32, both(hidden))
    np.testing.assert_allclose(forward, reverse, atol=2**-7 * np.abs(reverse).max())


OF_HALF = {
    "map": lambda h, w: jce.linear_map(jax.nn.logsumexp, Linear(h, w), reduction="sum", chunk_size=3),
    "map of each": lambda h, w: jce.linear_map(jax.nn.logsumexp, Linear(h, w), chunk_size=3).sum(),
    "entropies": lambda h, w: jce.linear_log_probs(np.zeros(7, int), h, w, chunk_size=3).entropy.sum(),
}


WAYS = list(itertools.product(OF_HALF, ["accelerator", "cpu"]))


@pytest.mark.parametrize(
    ("name", "platform"),
    [WAYS[0], *(pytest.param(*way, marks=pytest.mark.slow) for way in WAYS[1:])],
    indirect=["platform"],
)
def test_second_derivatives_in_half_precision(name, platform, rng):
    """Second derivatives with respect to hidden states and head, in all nestings, have bfloat16's accuracy."""
    numbers, directions = (
        tuple(jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((7, 4), (5, 4))) for _ in range(2)
    )
    programs = modes(OF_HALF[name], (0, 1))

    @jax.jit
    def run(numbers, directions):
        return [programs[mode](numbers, directions) for mode in SECOND]

    got = run(numbers, directions)
    expected = run(*jax.tree.map(lambda x: x.astype(np.float32), (numbers, directions)))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.float32(g) - e) <= 2**-6 * np.linalg.norm(e)


def divergence_at(temperature, x, y):
    """KL(p‖q) for each pair of rows, by the formula as written."""
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (x, y))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def value_and_derivatives(function, static):
    """For a function of T and two rows: its values, its gradients, and the gradients' derivative along a direction.

    If T is traced: values, gradients, and derivatives with respect to T: of the values (first and second), and of
    the gradients.
    """

    def gradient(t, *rows):
        return jax.grad(lambda *rows: function(static or t, *rows).sum(), (0, 1))(*rows)

    def along(f):
        return lambda t, *rows: jax.jvp(lambda t: f(t, *rows), (t,), (jnp.ones_like(t),))[1]

    def run(t, rows, directions):
        if static:
            return function(static, *rows), *jax.jvp(lambda *rows: gradient(t, *rows), rows, directions)
        slope = along(function)
        return [f(t, *rows) for f in (function, gradient, slope, along(slope), along(gradient))]

    return jax.jit(run)


@pytest.mark.parametrize(
    ("temperature", "traced"),
    [
        pytest.param(t, traced, marks=[] if (t, traced) == (3.0, False) else [pytest.mark.slow])
        for t in (0.7, 1.3, 3.0)
        for traced in (False, True)
    ],
)
def test_accuracy_at_a_temperature_for_similar_and_different_heads(temperature, traced, rng):
    """Two heads whose logits differ by amounts from one ulp to about 5, with a common offset.

    Errors are relative to the largest entry of a token. For differences of about 1 and 5, the float64 results are
    checked against the formula as written.
    """
    apart = np.repeat(np.float64([0, 1e-3, 1, 5]), 6)[:, None]
    x = (3 * rng.standard_normal((24, 12)) + np.resize(np.float64([0, 20, 1000]), (24, 1))).astype(np.float32)
    y = (x + apart * rng.standard_normal(x.shape)).astype(np.float32)
    y[:6] = np.nextafter(x[:6], rng.choice(np.float32([-np.inf, np.inf]), x[:6].shape))
    directions = tuple(rng.standard_normal((2, *x.shape)).astype(np.float32))

    def of_heads(t, x, y):
        hidden = jnp.eye(len(x), dtype=x.dtype)
        p, q = (Linear(hidden, z.T) for z in (x, y))
        return jce.linear_kl_divergence(p, q, temperature=t, reduction="none", chunk_size=24, precision="highest")

    t, static = np.float32(temperature), None if traced else float(np.float32(temperature))
    got = value_and_derivatives(of_heads, static)(t, (x, y), directions)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (t, (x, y), directions))
        exact, written = (value_and_derivatives(f, static)(*wide) for f in (of_heads, divergence_at))
    arrays = (map(np.asarray, jax.tree.leaves(x)) for x in (got, exact, written))
    for g, e, w in zip(*arrays, strict=True):
        scale = np.maximum(np.abs(e), np.asarray(exact[0])) if e.ndim == 1 else np.abs(e).max(-1, keepdims=True)
        assert (np.abs(g - e) <= 4e-6 * scale).all()
        assert (np.abs(e - w)[12:] <= 1e-7 * scale[12:]).all()


@pytest.mark.slow
def test_a_traced_temperature_with_forbidden_classes(rng):
    """A class that both heads forbid is absent. If p alone forbids a class, all derivatives are finite."""
    x, y = rng.standard_normal((2, 4, 6)).astype(np.float32)
    forbidden = np.float32([0, 0, 0, 0, -np.inf, -np.inf])

    @jax.jit
    def run(t, x, y, of_q):
        def loss(t, x, y):
            p, q = (Linear(jnp.eye(4), z.T, bias) for z, bias in ((x, forbidden), (y, of_q)))
            return jce.linear_kl_divergence(p, q, temperature=t)

        gradient = jax.value_and_grad(loss, (0, 1, 2))
        return jax.jvp(lambda t: gradient(t, x, y), (t,), (jnp.ones_like(t),))

    got, low = (run(np.float32(0.7), x, y, bias) for bias in (forbidden, np.maximum(forbidden, np.float32(-300))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, low)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(run(np.float32(0.7), x, y, 0 * x[0])))


@pytest.mark.slow
def test_second_derivatives_with_respect_to_a_temperature_if_p_alone_forbids_a_class():
    """The Hessian with respect to T and the bias of q is symmetric, and equals that of a formula in float64.

    The logit of one class of p is from -3 to -∞.
    """
    cases = list(itertools.product([-np.inf, -1e30, -200, -30, -3], [-4, -1, 1], [0.7, 1, 2]))
    x, y, t = (np.array(a, np.float32) for a in zip(*cases, strict=True))
    x, y = (np.stack([a, 0 * y, r + 0 * y], 1) for a, r in ((x, np.float32(1)), (y, np.float32(0))))

    def ours(y, t, x):
        p, q = (Linear(jnp.ones((1, 1), z.dtype), jnp.zeros((3, 1), z.dtype), z) for z in (x, y))
        return jce.linear_kl_divergence(p, q, temperature=t, reduction="sum")

    def plain(y, t, x):
        log_p, log_q = (jax.nn.log_softmax(z / t) for z in (jnp.maximum(x, -400), y))
        return (jnp.exp(log_p) * (log_p - log_q)).sum()

    def hessians(f, *arguments):
        return jax.jit(jax.vmap(jax.hessian(f, (0, 1))))(*arguments)

    got = hessians(ours, y, t, x)
    with jax.enable_x64(True):
        expected = hessians(plain, *(np.float64(a) for a in (y, t, x)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)
    np.testing.assert_allclose(got[0][1], got[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["by name", "map"])
@pytest.mark.slow
def test_two_heads_against_dense_logits_bit_for_bit(which, rng):
    """Value, gradient and a Hessian-vector product with identity heads, for similar and for different logits."""
    x = 3 * rng.standard_normal((12, 9)).astype(np.float32)
    y = x + np.resize(np.float32([1e-6, 1e-3, 1, 10]), (12, 1)) * rng.standard_normal((12, 9)).astype(np.float32)
    eye, t = np.eye(9, dtype=np.float32), tuple(rng.standard_normal((2, 12, 9)).astype(np.float32))

    def heads(x, y):
        p, q = Linear(x, eye), Linear(y, eye)
        if which == "map":
            return jce.linear_map(jce.kl_divergence_with_logits, p, q, chunk_size=12)
        return jce.linear_kl_divergence(p, q, reduction="none", temperature=2.0, chunk_size=12)

    def logits(x, y):
        t = np.float32(1 if which == "map" else 2)
        return jce.kl_divergence_with_logits(x / t, y / t)

    def program(f):
        gradient = jax.grad(lambda *a: f(*a).sum(), (0, 1))
        return jax.jit(lambda a, t: (f(*a), jax.jvp(gradient, a, t)))

    got, expected = (program(f)((x, y), t) for f in (heads, logits))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# Costs

LOSSES = {
    "label": (lambda t, s: jce.linear_map(ce, np.zeros(64, int), s, reduction="mean", chunk_size=16), 1, 3),
    "each label": (lambda t, s: jce.linear_map(ce, np.zeros(64, int), s, chunk_size=16).sum(), 1, 4),
    "log-probabilities and entropies": (
        lambda t, s: jce.linear_map(
            lambda y, x: jce.entropy_with_logits(x) - 2 * ce(y, x), np.zeros(64, int), s, reduction="sum", chunk_size=16
        ),
        1,
        3,
    ),
    "several numbers": (
        lambda t, s: sum(
            jce.linear_map(lambda x: (jce.entropy_with_logits(x), x.sum()), s, reduction="sum", chunk_size=16)
        ),
        1,
        4,
    ),
    "distillation": (lambda t, s: jce.linear_kl_divergence(t, s, chunk_size=16), 2, 4),
    "each distillation": (lambda t, s: jce.linear_kl_divergence(t, s, reduction="none", chunk_size=16).sum(), 2, 6),
    "mapped distillation": (
        lambda t, s: jce.linear_map(jce.kl_divergence_with_logits, t, s, reduction="mean", chunk_size=16),
        2,
        4,
    ),
}


@pytest.mark.needs_jit
@pytest.mark.parametrize("platform", ["cpu", "other"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.in_turn(4)
def test_number_of_matmuls(name, platform):
    loss, of_value, of_gradient = LOSSES[name]
    teacher, student = (
        Linear(jax.ShapeDtypeStruct((64, 8), np.float32), jax.ShapeDtypeStruct((40, 8), np.float32)) for _ in range(2)
    )

    def products(f):
        return needed(jax.make_jaxpr(f)(teacher, student).jaxpr, platform) / (64 * 8 * 40)

    assert products(loss) == of_value
    assert products(jax.value_and_grad(loss, 1)) == of_gradient
    if "distillation" in name:  # the teacher is trained too
        assert products(jax.value_and_grad(loss, (0, 1))) == (8 if "each" in name else 6)


@pytest.mark.needs_jit
@pytest.mark.parametrize(
    "mode", ["gradient", "forward over reverse", "reverse over reverse", "third order", "reverse three times"]
)
@pytest.mark.parametrize("name", ["map", "distillation"])
@pytest.mark.slow
def test_no_mode_has_the_logits_of_all_tokens(name, mode):
    tokens, d, n, chunk = 1024, 16, 4096, 32
    options = {"reduction": "mean", "chunk_size": chunk}

    def loss(h, w):
        x = Linear(h, w)
        if name == "map":
            return jce.linear_map(lambda x: jce.entropy_with_logits(x) + jax.nn.logsumexp(x), x, **options)
        return jce.linear_kl_divergence(x, Linear(h[:, ::-1], w[::-1]), **options)

    programs = modes(loss, (0, 1))

    def thrice(a, t):
        def inner(u):
            return sum((x * y).sum() for x, y in zip(u, t, strict=True))

        second = jax.grad(lambda a: inner(jax.grad(loss, (0, 1))(*a)))
        return jax.grad(lambda a: inner(second(a)))(a)

    program = programs.get(mode, thrice)
    a = jax.ShapeDtypeStruct((tokens, d), np.float32), jax.ShapeDtypeStruct((n, d), np.float32)
    text = optimized_jit(program).lower(a, a).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[(\d+(?:,\d+)+)\]", text)}
    # Only reverse mode nested three times keeps a gradient of the head for each chunk.
    assert max(map(math.prod, shapes)) < tokens * n / (1 if mode == "reverse three times" else 8)


# Errors


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("x",), {}, TypeError, r"function must be callable; got Linear.*comes first"),
        ((sum, ones(3)), {}, ValueError, r"must be a jce.Linear.*got arguments\[0\]: float32\[3\].*jax.vmap"),
        ((sum,), {}, ValueError, r"must be a jce.Linear.*got no arguments"),
        (
            (sum, ones(3, dtype=int), "x"),
            {},
            ValueError,
            r"begin with the token axes.*\(4,\).*arguments\[0\]: int.*shared",
        ),
        ((sum, "x", Linear(ones(3, 3), ones(5, 3))), {}, ValueError, r"all Linears the states of the same tokens"),
        ((sum, "x", 1.0), {}, ValueError, r"begin with the token axes.*arguments\[1\]: float\d\d\[\]"),
        ((sum, Linear(np.float32(1), ones(5, 3))), {}, ValueError, r"hidden must be .*hidden: float32\[\]"),
        ((sum, Linear(ones(4, 3), ones(3, 5))), {}, ValueError, r"head \[n, d\].*Transpose the head"),
        (
            (sum, Linear(ones(4, 3), ones(5, 3), ones(4))),
            {},
            ValueError,
            r"bias must have.*\(5,\).*arguments\[0\].bias",
        ),
        ((sum, Linear(ones(4, 3), ones(5, 3), None, 0)), {}, ValueError, r"logit_soft_cap must be"),
        ((sum, Linear(ones(4, 3, dtype=complex), ones(5, 3))), {}, TypeError, r"must be real"),
        ((sum, Linear("hidden", ones(5, 3))), {}, TypeError, r"arguments\[0\].hidden must be an array"),
        ((sum, Linear(ones(4, 3), None)), {}, TypeError, r"arguments\[0\].head must be an array.*NoneType"),
        (
            (sum, "x"),
            {"shared": {"a": object()}},
            TypeError,
            r"shared\['a'\] must be an array.*got shared\['a'\]: object",
        ),
        ((sum, "x"), {"shared": "scale"}, TypeError, r"shared must be an array"),
        ((sum, "x"), {"where": ones(3, dtype=bool)}, ValueError, r"where must broadcast.*\(4,\)"),
        ((sum, "x"), {"where": ones(4)}, TypeError, r"where must be boolean"),
        ((sum, "x"), {"weights": ones(3)}, ValueError, r"weights must broadcast.*Give a weight per token"),
        ((sum, "x"), {"weights": ones(5)}, ValueError, r"weights must broadcast.*weights=weights\[labels\]"),
        ((sum, "x"), {"reduction": "avg"}, ValueError, r"reduction must be"),
        ((sum, "x"), {"chunk_size": 0}, ValueError, r"chunk_size must be"),
        ((sum, "x"), {"axis_name": "nowhere"}, ValueError, r"axis_name must name an axis"),
        (
            (lambda x: jax.lax.complex(x, x), "x"),
            {"reduction": "sum"},
            TypeError,
            r"must be real.*complex64\[5\] for a token",
        ),
        (
            (lambda x: jax.lax.complex(x, x), "x"),
            {"weights": 2.0},
            TypeError,
            r"must be real.*complex64\[5\] for a token",
        ),
        (
            (lambda x: (x, jax.random.key(0)), "x"),
            {"reduction": "mean"},
            TypeError,
            r"must be real.*key<fry>\[\] for a token",
        ),
    ],
)
def test_errors(arguments, options, error, message):
    x = Linear(ones(4, 3), ones(5, 3))
    with pytest.raises(error, match=message) as raised:
        jce.linear_map(*(x if isinstance(a, str) else a for a in arguments), **options)
    assert str(raised.value).startswith("linear_map: ")


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        ((2, 1), "jnp.broadcast_to(arguments[0], (2, 3))"),
        ((1, 3), "jnp.broadcast_to(arguments[0], (2, 3))"),
        ((2, 1, 4), "jnp.broadcast_to(arguments[0], (2, 3, 4))"),
        ((2,), "jnp.broadcast_to(arguments[0][..., None], (2, 3))"),
        ((3,), "jnp.broadcast_to(arguments[0], (2, 3))"),
        ((), "jnp.broadcast_to(arguments[0], (2, 3))"),
        ((4,), None),
        ((1, 4), None),
    ],
)
def test_an_argument_without_all_token_axes(shape, written, rng):
    """The argument isn't broadcast. The error says how to broadcast it, and that code runs."""
    x, a = Linear(ones(2, 3, 3), ones(5, 3)), rng.standard_normal(shape).astype(np.float32)
    scaled = functools.partial(jce.linear_map, lambda a, x: a * x.sum())
    for call in (scaled, jax.jit(scaled)):
        with pytest.raises(
            ValueError, match=r"begin with the token axes of hidden, \(2, 3\); .*goes into shared\."
        ) as raised:
            call(a, x)
        assert (f"Write {written} to give each token its own." in str(raised.value)) == (written is not None)
        assert ("broadcast_to" in str(raised.value)) == (written is not None)
    if written:
        of_each = eval(written, {"jnp": jnp, "arguments": [a]})
        np.testing.assert_array_equal(scaled(of_each, x), 15 * of_each)


def test_errors_of_a_divergence():
    x = Linear(ones(4, 3), ones(5, 3))
    with pytest.raises(TypeError, match=r"linear_kl_divergence: p must be a jce.Linear; got an array.*target first"):
        jce.linear_kl_divergence(ones(4, 3), x)
    with pytest.raises(
        ValueError, match=r"linear_kl_divergence: p and q must have the same classes.*q.head: float32\[6"
    ):
        jce.linear_kl_divergence(x, Linear(ones(4, 3), ones(6, 3)))
    with pytest.raises(
        ValueError, match=r"linear_kl_divergence: temperature must be greater than 0; got temperature=0"
    ):
        jce.linear_kl_divergence(x, x, temperature=0)


# A loss with metrics


def loss_and_metrics(y, x):
    return ce(y, x), {"entropy": jce.entropy_with_logits(x), "right": x.argmax() == y, "top": jax.lax.top_k(x, 2)[0]}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_a_loss_with_metrics(reduction, rng):
    """The loss has the same derivatives as without metrics. Metrics have derivatives only with respect to weights.

    First and second derivatives of losses and metrics are tested.
    """
    y, a = rng.integers(0, CLASSES, 20), rng.uniform(0.5, 2, 20)
    h, w = rng.standard_normal((20, 3)), rng.standard_normal((CLASSES, 3))

    def both(h, w, a):
        loss, metrics = jce.linear_map(
            loss_and_metrics, y, Linear(h, w), weights=a, reduction=reduction, has_aux=True, chunk_size=8
        )
        return loss.sum(), jax.tree.map(lambda x: x.sum(0) if reduction == "none" else x, metrics)

    def alone(h, w, a, still=False):
        x = h @ w.T
        x = jax.lax.stop_gradient(x) if still else x
        share = a / a.sum() if reduction == "mean" else a
        of_each = {
            "loss": ce(y, x),
            "entropy": jce.entropy_with_logits(x),
            "right": (x.argmax(-1) == y).astype(x.dtype),
            "top": jax.lax.top_k(x, 2)[0],
        }
        return jax.tree.map(lambda r: jnp.tensordot(share, r, 1), of_each)

    def pull(f):  # a number that depends on every result
        return lambda *a: sum(jnp.sin(x).sum() for x in jax.tree.leaves(f(*a)))

    def expected(*a):
        metrics = alone(*a, still=True)
        return {k: metrics[k] for k in ("entropy", "right", "top")} | {"loss": alone(*a)["loss"]}

    def second(f):
        return lambda *a: jax.jvp(jax.grad(f, (0, 1, 2)), a, a)[1]

    with jax.enable_x64(True):
        (loss, metrics), got = jax.jit(jax.value_and_grad(both, (0, 1, 2), has_aux=True))(h, w, a)
        right = alone(h, w, a)
        np.testing.assert_allclose(loss, right["loss"], rtol=1e-12)
        for name, metric in metrics.items():
            np.testing.assert_allclose(metric, right[name], rtol=1e-12)
        of_loss = jax.grad(lambda *a: alone(*a)["loss"], (0, 1, 2))(h, w, a)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12), got, of_loss)
        for mode in (lambda f: jax.grad(f, (0, 1, 2)), second):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11),
                jax.jit(mode(pull(both)))(h, w, a),
                jax.jit(mode(pull(expected)))(h, w, a),
            )


@pytest.mark.parametrize("result", ["alone", "three", "vector", "integer"])
def test_results_that_are_not_a_pair_of_a_loss_and_metrics(result):
    results = {
        "alone": lambda x: x.sum(),
        "three": lambda x: (x.sum(), 1, 2),
        "vector": lambda x: (x, 1),
        "integer": lambda x: (x.argmax(), x),
    }
    with pytest.raises(TypeError, match="with has_aux, function must return a pair"):
        jce.linear_map(results[result], Linear(jnp.ones((2, 1)), jnp.ones((3, 1))), has_aux=True)


def test_random_keys_as_results(rng):
    """Random keys can't be results if masked or padding tokens would return 0, since there is no zero key."""
    x, keys = jce.Linear(ones(4, 3), ones(5, 3)), jax.random.split(jax.random.key(0), 4)

    def drawn(**options):
        return jce.linear_map(lambda key, x: jax.random.fold_in(key, x.size), keys, x, **options)

    assert drawn().shape == (4,)
    for options in ({"where": np.ones(4, bool)}, {"batch_invariant": True, "chunk_size": 2}):
        with pytest.raises(TypeError, match=r"linear_map: .*must not return random keys.*Return jax.random.key_data"):
            drawn(**options)


def test_a_metric_does_not_change_the_loss_or_its_gradient(rng):
    y = jnp.asarray(rng.integers(0, 5, 7))
    h, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((7, 3), (5, 3)))

    def loss(h, w, **options):
        def function(y, x):
            alone = jce.cross_entropy_with_integer_labels(y, x)
            return (alone, 3 * alone) if options else alone

        return jce.linear_map(function, y, jce.Linear(h, w), reduction="sum", chunk_size=4, **options)

    with_metric = jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, has_aux=True), (0, 1), has_aux=True))
    (value, metric), gradients = with_metric(h, w)
    expected, expected_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, w)
    np.testing.assert_allclose([value, metric], [expected, 3 * expected], rtol=1e-6)
    for got, gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)
