"""A head's loss inside another loop makes no tokens × classes array, whichever arguments stay the same at each step.

When JAX differentiates a loop, it moves out whatever doesn't change from step to step, so that all steps share it. From
an inner loop over chunks, it would move out all arrays that depend only on labels or on a teacher, for all tokens.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jce
from tests.losses_of_heads import losses
from tests.optimized_jit import optimized_jit

pytestmark = pytest.mark.needs_jit
TOKENS, CLASSES, WIDTH, CHUNK = 512, 1024, 4, 32
LOSSES = losses(TOKENS, CHUNK)
each_loss = pytest.mark.parametrize("name", LOSSES)
H, W, STEPS = (jnp.ones(shape, np.float32) for shape in ((TOKENS, WIDTH), (CLASSES, WIDTH), 3))

# Which arguments of a loss are constants, so that they are the same at each step
FIXED = {
    "nothing": lambda h, w, t: (h, w, t),
    "hidden states": lambda h, w, t: (H, w, t),
    "all except a number": lambda h, w, t: (H, W, t),
}


def around(loss, fixed):
    """The loss in each kind of loop.

    The arguments are a matrix that transforms hidden states, the head, hidden states, and one number per step.
    """

    def of_step(a, w, h, t):
        return loss(*fixed(jnp.tanh(h @ a), w, t))

    def scanned(a, w, h, ts):
        def step(h, t):
            h = jnp.tanh(h @ a)
            return h, loss(*fixed(h, w, t))

        return lax.scan(step, h, ts)[1].sum()

    def mapped(a, w, h, ts):
        return lax.map(lambda t: of_step(a, w, t * h, t), ts).sum()

    def checkpointed(a, w, h, ts):
        return jax.checkpoint(of_step)(a, w, h, ts[0])

    def chosen(a, w, h, ts):
        return lax.cond(ts[0] > 1, of_step, lambda a, w, h, t: t * a.sum(), a, w, h, ts[0])

    def repeated(a, w, h, ts):
        return lax.fori_loop(0, jnp.int32(ts[0]), lambda i, s: s + of_step(a, w, h, s), ts[0])

    return [scanned, mapped, checkpointed, chosen], repeated


def elements(text: str) -> int:
    """The number of elements of the largest array in a compiled program."""
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\d+\[(\d+(?:,\d+)*)\]", text))


@each_loss
@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.in_turn(36)
def test_no_loop_has_the_logits_of_all_tokens(name, fixed):
    """The program has value, gradient and jvp. For a loop without reverse mode, it has only value and jvp."""
    both_ways, forward = around(LOSSES[name], FIXED[fixed])

    def program(a, w, h, ts):
        primals, tangents = (a, w, h, ts), (a, w, h, ts)
        results = [jax.jvp(forward, primals, tangents)]
        for f in both_ways:
            results += [jax.value_and_grad(f, (0, 1, 3))(a, w, h, ts), jax.jvp(f, primals, tangents)]
        return results

    arguments = jnp.eye(WIDTH, dtype=np.float32), W, H, STEPS
    compiled = optimized_jit(program).lower(*arguments).compile()
    assert elements(compiled.as_text()) <= max(CHUNK * CLASSES, 4 * TOKENS * WIDTH) * 2


@pytest.mark.parametrize("name", ["mean", "divergence", "map of each", "a number and a bool"])
@pytest.mark.in_turn(4)
def test_a_gradient_in_a_loop_differentiated_again(name):
    """Gradient steps in a scan, and the gradient of their result: reverse mode over reverse mode."""

    def after_steps(w, h, ts):
        def step(w, t):
            return w - t * jax.grad(LOSSES[name], 1)(h, w, t), None

        return lax.scan(step, w, ts)[0].sum()

    compiled = optimized_jit(jax.grad(after_steps, (0, 1))).lower(W, H, STEPS).compile()
    assert elements(compiled.as_text()) <= 2 * CHUNK * CLASSES


OF_EACH = {
    "none": lambda y, h, w: jce.linear_cross_entropy(y, h, w, reduction="none", chunk_size=CHUNK),
    "log-probabilities": lambda y, h, w: jce.linear_log_probs(y, h, w, chunk_size=CHUNK).log_prob,
    "map": lambda y, h, w: jce.linear_map(lambda x: jnp.sin(x).sum(), jce.Linear(h, w), chunk_size=CHUNK),
    "lists": lambda y, h, w: jce.linear_cross_entropy(
        y[:, None], h, w, label_probs=jnp.full((TOKENS, 1), 0.5, np.float32), reduction="none", chunk_size=CHUNK
    ),
}


@pytest.mark.parametrize("name", OF_EACH)
@pytest.mark.in_turn(4)
def test_cotangents_that_depend_on_each_loss(name):
    """The squares of each token's loss, in reverse mode over reverse mode."""
    y = jnp.zeros(TOKENS, int)
    gradient = jax.grad(lambda *a: jnp.square(OF_EACH[name](y, *a)).sum(), (0, 1))
    twice = jax.grad(lambda *a: sum(jnp.square(g).sum() for g in gradient(*a)), (0, 1))
    compiled = optimized_jit(twice).lower(H, W).compile()
    assert elements(compiled.as_text()) <= 2 * CHUNK * CLASSES


@pytest.mark.parametrize("frozen", ["teacher", "all"])
def test_matmuls_of_constants_are_not_folded(frozen):
    """The program closes over a teacher with at most one chunk of tokens: there is no loop, but XLA folds nothing."""
    h, w = (jnp.asarray(np.random.default_rng(0).standard_normal(s), np.float32) for s in ((8, 4), (16, 4)))
    y = jnp.zeros(8, int)

    def divergence(h2, w2):
        return jce.linear_kl_divergence(jce.Linear(h, w), jce.Linear(h2, w2))

    def values(_, __):
        return (
            jce.linear_cross_entropy(y, h, w),
            jce.linear_log_probs(y, 2 * h, w),
            jce.linear_map(jnp.max, jce.Linear(3 * h, w)),
        )

    program, products = {"teacher": (jax.grad(divergence, (0, 1)), 4), "all": (values, 3)}[frozen]
    text = optimized_jit(program).lower(h, w).compile().as_text()
    assert text.count(" dot(") == products
