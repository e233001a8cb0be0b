"""Recipes for heads, compared with their formulas on dense logits: value, gradient, and no N × n array.

The recipes come from the README and from `linear_map`. If a change of jce breaks a recipe, a test here fails.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from jce import Linear
from tests.optimized_jit import optimized_jit
from tests.test_devices import make_mesh

N, WIDTH, KEPT, CHUNK = 12, 3, 4, 5  # N is the number of tokens, and also of classes
AHEAD = (1, 2)  # how many tokens ahead the first and the second logits predict
TEMPERATURE, GAMMA, EPSILON, SHARPNESS, BIAS = 0.5, 2.0, 1.5, 3.0, -1.25
SMOOTHING, SCALE, CAP, Z_LOSS = 0.1, 0.3, 0.7, 0.2
ce, bce = jce.cross_entropy_with_integer_labels, jce.binary_cross_entropy_with_logits


def kept_by_the_sampler(y, ids, x):
    return ce(y, x, where=jnp.zeros(x.shape, bool).at[ids].set(True, mode="drop"))


def dynamic_fine_tuning(y, x):
    loss = ce(y, x)
    return loss * jax.lax.stop_gradient(jnp.exp(-loss))


def focal(y, x):
    loss = ce(y, x)
    return (-jnp.expm1(-loss)) ** GAMMA * loss


def poly_1(y, x):
    loss = ce(y, x)
    return loss - EPSILON * jnp.expm1(-loss)


def several_ahead(labels, logits):
    return sum(ce(y, x, where=y >= 0) for y, x in zip(labels, logits, strict=True))


def mapped(function, *others, h, w, **options):
    return jce.linear_map(function, *others, Linear(h, w), reduction="mean", **options)


def clip(h, w, **options):
    pairs = jnp.arange(len(h))
    one, other = (jce.linear_cross_entropy(pairs, a / TEMPERATURE, b, **options) for a, b in ((h, w), (w, h)))
    return (one + other) / 2


def siglip(h, w, **options):
    pairs = jnp.arange(len(h))
    logits = Linear(SHARPNESS * h, w, jnp.full(len(w), BIAS, h.dtype))
    return jce.linear_map(
        lambda i, x: bce(jnp.arange(x.size) == i, x).sum(), pairs, logits, reduction="mean", **options
    )


def others_smoothed(y, h, w, **options):
    n = len(w)
    return jce.linear_cross_entropy(y, h, w, label_smoothing=SMOOTHING * n / (n - 1), **options)


def scaled(y, h, w, **options):
    """Three losses of scaled logits: scaled before a soft cap, after a soft cap, and without one but with a z-loss."""
    s, c, t = SCALE, CAP, TEMPERATURE
    return (
        jce.linear_cross_entropy(y, h, w, logit_soft_cap=c / s, temperature=t / s, **options)
        + jce.linear_cross_entropy(y, h, w, logit_soft_cap=c, temperature=1 / s, **options)
        + jce.linear_cross_entropy(y, h, w, temperature=1 / s, z_loss=Z_LOSS, **options)
    )


def of_classes(w):
    """One weight per class."""
    return 1 + jnp.arange(len(w), dtype=w.dtype) / len(w)


def classes_weighted(y, h, w, **options):
    """A class-weighted loss. Some labels are outside [0, n), so their weights are whatever indexing returns."""
    labels = jnp.where(y % 3 == 0, -100, y)
    return jce.linear_cross_entropy(labels, h, w, weights=of_classes(w)[labels], where=labels >= 0, **options)


def next_word(words, states, w, **options):
    nexts = jnp.pad(words[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jce.linear_cross_entropy(nexts, states, w, where=nexts >= 0, **options)


def z_loss_apart(y, h, w, **options):
    of = jce.linear_log_probs(y, h, w, log_normalizer=True, **options)
    return -of.log_prob.mean() + Z_LOSS * jnp.square(of.log_normalizer).mean()


def in_sequences(y, h):
    return y.reshape(2, -1), h.reshape(2, -1, h.shape[-1])


def ahead(labels):
    """Labels for each number of tokens ahead, -1 past the end of the text."""
    return [jnp.pad(labels[k:], (0, k), constant_values=-1) for k in AHEAD]


# Each recipe as a function of labels, kept ids, hidden states and a head. WHOLE has the same on dense logits.
LINES = {
    "the sampler's kept set": lambda y, ids, h, w, **k: mapped(kept_by_the_sampler, y, ids, h=h, w=w, **k),
    "DFT": lambda y, ids, h, w, **k: mapped(dynamic_fine_tuning, y, h=h, w=w, **k),
    "focal": lambda y, ids, h, w, **k: mapped(focal, y, h=h, w=w, **k),
    "poly-1": lambda y, ids, h, w, **k: mapped(poly_1, y, h=h, w=w, **k),
    "CLIP": lambda y, ids, h, w, **k: clip(h, w, **k),
    "SigLIP": lambda y, ids, h, w, **k: siglip(h, w, **k),
    "several tokens ahead": lambda y, ids, h, w, **k: jce.linear_map(
        several_ahead, ahead(y), [Linear(h, w), Linear(jnp.sin(h), w)], reduction="mean", **k
    ),
    "smoothing without the label": lambda y, ids, h, w, **k: others_smoothed(y, h, w, **k),
    "a logit scale": lambda y, ids, h, w, **k: scaled(y, h, w, **k),
    "class weights": lambda y, ids, h, w, **k: classes_weighted(y, h, w, **k),
    "the next word": lambda y, ids, h, w, **k: next_word(*in_sequences(y, h), w, **k),
    "a separate z-loss": lambda y, ids, h, w, **k: z_loss_apart(y, h, w, **k),
}


def log_q(x):
    return x - jax.scipy.special.logsumexp(x, -1, keepdims=True)


def at(log_q, y):
    return log_q[jnp.arange(len(y)), y]


def whole_kept(y, ids, h, w):
    x = h @ w.T
    there = (ids[:, :, None] == jnp.arange(len(w))[None, None]).any(1)
    return -at(log_q(jnp.where(there, x, -jnp.inf)), y).mean()


def whole_ahead(y, ids, h, w):
    total = 0.0
    for k, states in zip(AHEAD, (h, jnp.sin(h)), strict=True):
        total -= at(log_q(states[:-k] @ w.T), y[k:]).sum()
    return total / len(h)


def whole_clip(y, ids, h, w):
    x = h @ w.T / TEMPERATURE
    return -(jnp.diagonal(log_q(x)) + jnp.diagonal(log_q(x.T))).mean() / 2


def whole_siglip(y, ids, h, w):
    sign = 2 * jnp.eye(len(h)) - 1
    return jnp.log1p(jnp.exp(-sign * (SHARPNESS * h @ w.T + BIAS))).sum() / len(h)


def whole_others_smoothed(y, ids, h, w):
    """The label keeps 1-ε, and each of the other classes has ε/(n-1)."""
    n = len(w)
    one_hot = jax.nn.one_hot(y, n, dtype=h.dtype)
    targets = (1 - SMOOTHING) * one_hot + SMOOTHING / (n - 1) * (1 - one_hot)
    return -(targets * log_q(h @ w.T)).sum(-1).mean()


def whole_scaled(y, ids, h, w):
    u = h @ w.T
    before, after = CAP * jnp.tanh(SCALE * u / CAP) / TEMPERATURE, SCALE * CAP * jnp.tanh(u / CAP)
    penalty = Z_LOSS * jnp.square(jax.scipy.special.logsumexp(SCALE * u, -1))
    return (penalty - sum(at(log_q(x), y) for x in (before, after, SCALE * u))).mean()


def whole_classes_weighted(y, ids, h, w):
    weights = jnp.where(y % 3 == 0, 0, of_classes(w)[y])
    return -(weights * at(log_q(h @ w.T), y)).sum() / weights.sum()


def whole_next_word(y, ids, h, w):
    words, states = in_sequences(y, h)
    nexts, states = words[:, 1:].ravel(), states[:, :-1].reshape(-1, h.shape[1])
    return -at(log_q(states @ w.T), nexts).mean()


def whole_z_loss(y, ids, h, w):
    x = h @ w.T
    return (Z_LOSS * jnp.square(jax.scipy.special.logsumexp(x, -1)) - at(log_q(x), y)).mean()


def of_each(formula):
    """The mean over tokens of a formula in q, the label's probability."""
    return lambda y, ids, h, w: formula(jnp.exp(at(log_q(h @ w.T), y))).mean()


WHOLE = {
    "the sampler's kept set": whole_kept,
    "DFT": of_each(lambda q: -jax.lax.stop_gradient(q) * jnp.log(q)),
    "focal": of_each(lambda q: -((1 - q) ** GAMMA) * jnp.log(q)),
    "poly-1": of_each(lambda q: EPSILON * (1 - q) - jnp.log(q)),
    "CLIP": whole_clip,
    "SigLIP": whole_siglip,
    "several tokens ahead": whole_ahead,
    "smoothing without the label": whole_others_smoothed,
    "a logit scale": whole_scaled,
    "class weights": whole_classes_weighted,
    "the next word": whole_next_word,
    "a separate z-loss": whole_z_loss,
}


@pytest.fixture
def sample(rng):
    """Labels, kept ids (with the label among them, padded with n), hidden states, and a head."""
    y = rng.integers(0, N, N)
    ids = np.concatenate([y[:, None], rng.integers(0, N, (N, KEPT - 1))], 1)
    ids[::2, -2:] = N
    return y, ids, *rng.standard_normal((2, N, WIDTH))


@pytest.mark.wide
def test_recipes_equal_their_formulas(sample):
    """Values and both gradients, in float64, all in one program."""

    def results(y, ids, h, w):
        return [
            {name: jax.value_and_grad(f, (2, 3))(y, ids, h, w, **options) for name, f in functions.items()}
            for functions, options in ((LINES, {"chunk_size": CHUNK}), (WHOLE, {}))
        ]

    with jax.enable_x64(True):
        got, expected = jax.jit(results)(*sample)
    for name, numbers in expected.items():
        for g, e in zip(jax.tree.leaves(got[name]), jax.tree.leaves(numbers), strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.needs_jit
@pytest.mark.slow
def test_recipes_never_hold_the_logits_of_all_tokens():
    """Programs for value and gradient have no N × n array. In total they hold a few chunks, heads and hidden states."""
    n, d, chunk = 1024, 8, 16
    integers, numbers = jax.ShapeDtypeStruct((n,), np.int32), jax.ShapeDtypeStruct((n, d), np.float32)
    ids = jax.ShapeDtypeStruct((n, KEPT), np.int32)

    def largest_and_all(functions, **options):
        def every(*arguments):
            return {name: jax.value_and_grad(f, (2, 3))(*arguments, **options) for name, f in functions.items()}

        compiled = optimized_jit(every).lower(integers, ids, numbers, numbers).compile()
        shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[(\d+(?:,\d+)+)\]", compiled.as_text())}
        return max(map(math.prod, shapes)), compiled.memory_analysis().temp_size_in_bytes / 4

    largest, temporaries = largest_and_all(LINES, chunk_size=chunk)
    assert largest < n * n / 8
    assert temporaries < n * n / 2  # for all recipes together
    assert min(largest_and_all({"focal": WHOLE["focal"]})) >= n * n  # the check finds an N × n array where there is one


@pytest.mark.slow
def test_an_id_of_minus_1_wraps_around(sample):
    """JAX turns -1 into the last class, in every mode, so that class would count as kept. Pad lists with n instead."""
    y, _, h, w = (x.astype(np.float32 if x.dtype == np.float64 else np.int32) for x in sample)
    w[-1] = 20 * h[0]  # a class that all except one of these tokens rule out
    line = functools.partial(LINES["the sampler's kept set"], y[:1], h=h[:1], w=w)
    assert y[0] != N - 1
    padded, wrapped = (line(np.array([[y[0], y[0], pad, pad]])) for pad in (N, -1))
    assert padded == 0
    assert wrapped > 10


def kept_here(y, ids, x):
    """The loss on one device's part of the classes. Ids of other devices' classes are out of range, and are dropped."""
    local = ids - jax.lax.axis_index("classes").astype(ids.dtype) * x.size
    here = jnp.zeros(x.shape, bool).at[jnp.where(local < 0, x.size, local)].set(True, mode="drop")
    return ce(y, x, where=here, axis_name="classes")


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="this JAX has no vmap of a psum in a shard_map")
@pytest.mark.slow
def test_the_samplers_kept_set_with_split_classes(sample):
    y, ids, h, w = sample
    split = jce.on_mesh(jce.linear_map, mesh=make_mesh((2, 4)), token_axis="tokens", class_axis="classes")

    def line(h, w):
        return split(kept_here, y, ids, Linear(h, w), reduction="mean", chunk_size=CHUNK)

    with jax.enable_x64(True):
        got = jax.jit(jax.value_and_grad(line, (0, 1)))(h, w)
        expected = jax.value_and_grad(functools.partial(whole_kept, y, ids), (0, 1))(h, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)


def test_accuracy_for_a_confident_token():
    """Losses that depend on 1 - q are accurate in float32 if q, the label's probability, is 1 - 2e^-25."""
    x, s = np.float32([25.0, 0.0, 0.0]), 2 * np.exp(-25.0)
    np.testing.assert_allclose([focal(0, x), poly_1(0, x)], [s**3, (1 + EPSILON) * s], rtol=1e-5)
    in_x, _, _ = jax.grad(focal, 1)(0, x)
    np.testing.assert_allclose(in_x, -3 * s**3, rtol=1e-5)


@pytest.mark.needs_jit
def test_a_float32_head_with_bfloat16_matmuls(sample):
    """If the head is cast to the states' dtype, matmuls are in bfloat16 with float32 sums, otherwise in float32."""
    y, _, h, w = sample
    h, w = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, np.float32)

    def cast(h, w):
        return jce.linear_cross_entropy(y, h, w.astype(h.dtype), chunk_size=CHUNK)

    def as_it_is(h, w):
        return jce.linear_cross_entropy(y, h, w, chunk_size=CHUNK)

    def dtypes_of_products(loss):
        text = jax.jit(loss).lower(h, w).as_text()
        return {*re.findall(r"dot_general .*\(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>", text)}

    assert dtypes_of_products(cast) == {("bf16", "bf16", "f32")}
    assert dtypes_of_products(as_it_is) == {("f32", "f32", "f32")}
    value, gradient = jax.value_and_grad(cast, 1)(h, w)
    assert gradient.dtype == np.float32
    x = np.float64(h) @ np.float64(w.astype(h.dtype)).T
    np.testing.assert_allclose(value, -at(x - np.log(np.exp(x).sum(-1, keepdims=True)), y).mean(), rtol=1e-6)


@pytest.mark.needs_jit
def test_the_ratio_of_trainer_to_sampler_is_1(rng):
    """Log-probabilities of one token at a time have the same bits as in a masked batch inside a policy's gradient."""
    tokens, classes, width = 40, 300, 33
    h, w = (jnp.asarray(rng.standard_normal(s), np.float32) for s in ((tokens, width), (classes, width)))
    y, advantages = jnp.asarray(rng.integers(0, classes, tokens)), jnp.asarray(rng.standard_normal(tokens), np.float32)
    kept = jnp.arange(tokens) % 3 != 1
    options = {"temperature": TEMPERATURE, "chunk_size": 16, "batch_invariant": True}

    @optimized_jit
    def sampled(y, h):
        return jce.linear_log_probs(y, h, w, **options).log_prob

    old = jnp.concatenate([sampled(y[i : i + 1], h[i : i + 1]) for i in range(tokens)])

    def loss(h, w):
        ratio = jnp.exp(jce.linear_log_probs(y, h, w, where=kept, **options).log_prob - old)
        return -(ratio * advantages).sum(where=kept), ratio

    ratio = optimized_jit(jax.grad(loss, (0, 1), has_aux=True))(h, w)[1]
    np.testing.assert_array_equal(ratio[kept], 1)


def test_mutual_information_of_a_joint_table():
    """The value is H(X) + H(Y) - H(X, Y), and the gradient is log p_xy / p_x p_y - 1.

    A cell of 0 still counts in the sums of its row and column.
    """
    joint = np.float32([[0.25, 0, 0.125], [0.25, 0.375, 0], [0, 0, 0]])  # with a row of zeros
    there, in_row, in_column = joint > 0, joint.sum(1)[:, None] > 0, joint.sum(0)[None] > 0

    def ours(joint, **options):
        product = joint.sum(1)[:, None] * joint.sum(0)[None]
        return jce.kl_divergence(joint.ravel(), product.ravel(), **options)

    value, gradient = jax.value_and_grad(lambda joint: ours(joint, where=there.ravel()))(joint)
    of_parts = jce.entropy(joint.sum(1)) + jce.entropy(joint.sum(0)) - jce.entropy(joint.ravel())
    np.testing.assert_allclose(value, of_parts, rtol=1e-6)
    assert ours(joint) == value
    ratio = np.divide(joint, joint.sum(1)[:, None] * joint.sum(0)[None], where=there, out=np.ones_like(joint))
    np.testing.assert_allclose(gradient, np.log(ratio) + there - 1.0 * in_row - in_column, rtol=1e-6)
    np.testing.assert_array_equal(np.isneginf(jax.grad(ours)(joint)), ~there & in_row & in_column)
