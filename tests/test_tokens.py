"""Under `jax.vmap` of a `linear_*` function, all members' tokens share one loop and one sum for the head's gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from tests.jaxprs import equations
from tests.kernels import modes
from tests.optimized_jit import optimized_jit

BATCH, TOKENS, WIDTH, CLASSES = 2, 7, 3, 11


def mean(y, h, w, b, a):
    return jce.linear_cross_entropy(y, h, w, b, weights=a, where=y > 2, label_smoothing=0.1, chunk_size=4)


def total(y, h, w, b, a):
    return jce.linear_cross_entropy(y, h, w, b, reduction="sum", logit_soft_cap=a.sum() + 3, chunk_size=4)


def each(y, h, w, b, a):
    return jce.linear_cross_entropy(y, h, w, b, weights=a, reduction="none", z_loss=0.1, chunk_size=4)


def log_probs(y, h, w, b, a):
    return sum(jnp.sin(x) for x in jce.linear_log_probs(y, h, w, b, logit_soft_cap=a.sum() + 3, chunk_size=4))


def divergence(y, h, w, b, a):
    p, q = jce.Linear(jnp.sin(h), w), jce.Linear(h, w, b)
    return jce.linear_kl_divergence(p, q, weights=a, where=y > 2, chunk_size=4)


FUNCTIONS = {"mean": mean, "sum": total, "none": each, "log-probabilities": log_probs, "divergence": divergence}
# The batch axes of labels, hidden states, head, bias and weights
AXES = {
    "tokens": (0, 0, None, None, 0),
    "another axis": (-1, 1, None, None, None),
    "hidden states": (None, 0, None, None, None),
    "labels": (0, None, None, None, None),
    "weights": (None, None, None, None, 0),
    "bias": (0, 0, None, 0, None),
    "all": (0, 0, 0, 0, 0),
}


def arguments(rng, axes):
    shapes = (TOKENS,), (TOKENS, WIDTH), (CLASSES, WIDTH), (CLASSES,), (TOKENS,)
    full = [
        s if axis is None else np.insert(s, axis % (len(s) + 1), BATCH) for s, axis in zip(shapes, axes, strict=True)
    ]
    return rng.integers(0, CLASSES, full[0]), *(rng.standard_normal(s) for s in full[1:4]), rng.random(full[4])


def one_at_a_time(function, axes):
    def loop(*arguments):
        moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arguments, axes, strict=True)]
        members = range(BATCH)
        return jnp.stack(
            [function(*(x if a is None else x[i] for x, a in zip(moved, axes, strict=True))) for i in members]
        )

    return loop


# Every function with the batch "tokens", and every other batch with one function
TOGETHER = [
    (f, a) for i, a in enumerate(AXES) for j, f in enumerate(FUNCTIONS) if a == "tokens" or i % len(FUNCTIONS) == j
]


@pytest.mark.needs_jit
@pytest.mark.parametrize(("function", "axes"), TOGETHER)
@pytest.mark.slow
def test_a_batch_equals_its_members(function, axes, rng):
    """Values, gradients and Hessian-vector products equal those of the members one at a time, in float64."""
    function, axes = FUNCTIONS[function], AXES[axes]
    with jax.enable_x64(True):
        y, *numbers = arguments(rng, axes)
        numbers, directions = tuple(numbers), tuple(rng.standard_normal(x.shape) for x in numbers)

        def everything(batched, y, a, t):
            def scalar(*a):
                return jnp.square(batched(y, *a)).sum()

            programs = modes(scalar, (0, 1, 2, 3))
            return [programs[m](a, t) for m in ("value", "gradient", "forward over reverse", "reverse over reverse")]

        program = jax.jit(everything, static_argnums=0)
        got, expected = (
            program(f(function, axes), y, numbers, directions) for f in (lambda f, a: jax.vmap(f, a), one_at_a_time)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)


@pytest.mark.needs_jit
@pytest.mark.slow
def test_gradients_of_each_member(rng):
    """If the gradient is taken inside the batch, each member has its own head gradient. Batches may be nested."""
    axes = AXES["tokens"]
    y, *numbers = arguments(rng, axes)
    gradient = jax.grad(mean, 2)
    got = jax.vmap(gradient, axes)(y, *numbers)
    np.testing.assert_allclose(got, one_at_a_time(gradient, axes)(y, *numbers), rtol=1e-5, atol=1e-6)
    twice = jax.vmap(jax.vmap(mean, axes), (0, 0, None, None, 0))
    y, h, w, b, a = y, *numbers
    got = twice(*(jnp.stack([x, x[::-1]]) for x in (y, h)), w, b, jnp.stack([a, a[::-1]]))
    one = one_at_a_time(mean, axes)(y, *numbers)
    np.testing.assert_allclose(got, [one, one[::-1]], rtol=1e-5)


@pytest.mark.needs_jit
@pytest.mark.parametrize("function", ["mean", "none", "log-probabilities"])
@pytest.mark.in_turn(3)
def test_cost_of_a_batch(function):
    """A batch takes four matmuls (like a loss per token), one array of the head's shape, and no chunk per member."""
    batch, tokens, d, n, chunk = 32, 32, 64, 2048, 64
    options = {"chunk_size": chunk}
    losses = {
        "mean": lambda y, h, w: jce.linear_cross_entropy(y, h, w, **options),
        "none": lambda y, h, w: jce.linear_cross_entropy(y, h, w, reduction="none", **options).mean(),
        "log-probabilities": lambda y, h, w: sum(x.mean() for x in jce.linear_log_probs(y, h, w, **options)),
    }
    y = np.zeros((batch, tokens), np.int32)
    h, w = jax.ShapeDtypeStruct((batch, tokens, d), np.float32), jax.ShapeDtypeStruct((n, d), np.float32)
    loss = jax.vmap(losses[function], (0, 0, None))
    program = jax.value_and_grad(lambda h, w: loss(y, h, w).mean(), (0, 1))
    dots = [e for e in equations(jax.make_jaxpr(program)(h, w).jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 4
    compiled = optimized_jit(program).lower(h, w).compile()
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[(\d+(?:,\d+)+)\]", compiled.as_text())]
    assert max(map(math.prod, shapes)) == n * max(chunk, d)
    most = 3 if jax.__version_info__ >= (0, 10) else 4  # older XLA overwrites a chunk's exponentials less often
    assert compiled.memory_analysis().temp_size_in_bytes / 4 < most * n * max(chunk, d) + 8 * n + 3 * batch * tokens * d
