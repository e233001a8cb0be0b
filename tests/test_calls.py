"""Calls: a closed-over array is not folded, an eager call transfers nothing, a collective in a head is rejected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jce

pytestmark = pytest.mark.needs_jit
ROWS, CLASSES = 64, 2048
rng = np.random.default_rng(0)
TEACHER = rng.standard_normal((ROWS, CLASSES)).astype(np.float32)
PROBS = np.asarray(jax.nn.softmax(TEACHER))
CLOSING_OVER = {
    "logits": (TEACHER, jce.kl_divergence_with_logits),
    "logits by keyword": (TEACHER, lambda t, x: jce.kl_divergence_with_logits(q_logits=x, p_logits=t)),
    "probabilities": (PROBS, lambda p, x: jce.kl_divergence(p, jax.nn.softmax(x))),
    "two rows of logits": (TEACHER, jce.jensen_shannon_divergence_with_logits),
    "a row alone": (TEACHER, lambda t, x: jce.entropy_with_logits(t) * x.sum(-1)),
    "logits in a loop": (TEACHER, lambda t, x: jax.lax.map(lambda x: jce.kl_divergence_with_logits(t, x), x[None])),
}


@pytest.mark.parametrize("name", CLOSING_OVER)
@pytest.mark.in_turn(3, "wide")
def test_a_large_constant_is_not_folded(name):
    """The program treats an array that it closes over like an argument: nothing is computed during compilation."""
    array, function = CLOSING_OVER[name]
    array, x = jnp.asarray(array), jnp.zeros((ROWS, CLASSES), jnp.float32)

    def operations(program, *arguments):
        text = (
            jax.jit(jax.value_and_grad(program, -1 if len(arguments) > 1 else 0)).lower(*arguments).compile().as_text()
        )
        return [text.count(f" {operation}(") for operation in ("exponential", "log", "divide")]

    as_argument = operations(lambda t, x: function(t, x).sum(), array, x)
    assert operations(lambda x: function(array, x).sum(), x) == as_argument
    assert sum(as_argument) > 0


H, W = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((8, 4), (6, 4)))
LABELS, MASK = jnp.arange(8) % 6, jnp.arange(8) > 2
HEADS = {"a matrix": lambda: W, "a function": lambda: lambda h: jnp.matmul(h, W.T)}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.wide
def test_an_eager_call_transfers_nothing(head):
    linear = jce.Linear(H, HEADS[head]())
    calls = [
        lambda: jce.linear_cross_entropy(LABELS, linear, temperature=2.0, label_smoothing=0.1, z_loss=0.1),
        lambda: jce.linear_cross_entropy(LABELS, H, HEADS[head](), where=MASK, logit_soft_cap=3.0),
        lambda: jce.linear_log_probs(LABELS, linear).entropy,
        lambda: jce.linear_kl_divergence(linear, linear),
    ]
    if head == "a function":  # a linear_map with a matrix isn't jitted, so it transfers what JAX's own eager calls do
        calls.append(lambda: jce.linear_map(jce.cross_entropy_with_integer_labels, LABELS, linear, where=MASK))
    with jax.transfer_guard("disallow"):
        results = jax.block_until_ready([call() for call in calls])
    for got, call in zip(results, calls, strict=True):
        np.testing.assert_array_equal(got, call())


def test_a_collective_in_a_head():
    """A collective is rejected with an error that says what to do instead, and that advice is correct."""
    mesh = jax.make_mesh((2, 2), ("tokens", "width"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    split = functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("tokens", "width"), P(None, "width"), P("tokens")),
        out_specs=P("tokens"),
        check_vma=False,
    )

    def summed(h, w, y):
        return jce.linear_cross_entropy(y, h, lambda h: jax.lax.psum(h @ w.T, "width"), reduction="none")

    def gathered(h, w, y):
        h, w = (jax.lax.all_gather(x, "width", axis=1, tiled=True) for x in (h, w))
        return jce.linear_cross_entropy(y, h, lambda h: h @ w.T, reduction="none")

    with pytest.raises(ValueError, match=r"head must not communicate.*it names width.*all_gather"):
        split(summed)(H, W, LABELS)
    expected = jce.cross_entropy_with_integer_labels(LABELS, H @ W.T)
    np.testing.assert_allclose(jax.jit(split(gathered))(H, W, LABELS), expected, rtol=1e-5)
