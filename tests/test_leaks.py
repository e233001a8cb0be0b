"""After a call, jce keeps no argument, no array made from the arguments, and no tracer."""

import gc

import jax
import jax.numpy as jnp
import pytest

from tests.kernels import each_function, easy, gradient, total
from tests.losses_of_heads import losses

TOKENS, WIDTH, CLASSES = 29, 3, 53  # shapes that nothing else has
LOSSES = losses(TOKENS, 16)
each_loss = pytest.mark.parametrize("name", LOSSES)


def arguments(fill=1.0):
    return jnp.full((TOKENS, WIDTH), fill), jnp.full((CLASSES, WIDTH), fill), jnp.full((), 1 + fill)


def kept(*shapes) -> list:
    gc.collect()
    return [x.shape for x in jax.live_arrays() if x.shape in shapes]


@each_loss
@pytest.mark.slow
def test_eager_calls_and_gradients_keep_no_array(name):
    """No argument is kept, and no array made from the arguments: logits, gradients, copies in chunks."""
    for k in range(3):
        LOSSES[name](*arguments(k + 1.0))
        jax.grad(LOSSES[name], (0, 1, 2))(*arguments(k + 1.5))
    shapes = [(TOKENS, WIDTH), (CLASSES, WIDTH), (2, 16, WIDTH), (16, CLASSES), (TOKENS, CLASSES)]
    assert not kept(*shapes)


@each_function
@pytest.mark.in_turn(8, "wide")
def test_functions_of_rows_keep_no_array(kernel, rng):
    shape = (31, 5)
    rows = [jnp.asarray(x) for x in easy(kernel, rng, shape)]
    kernel.function(*rows)
    gradient(kernel)(*rows)
    jax.grad(total(kernel))(*rows)
    del rows
    assert not kept(shape)


@pytest.mark.needs_jit
@each_loss
@pytest.mark.slow
@pytest.mark.long
def test_no_tracer_is_kept(name):
    """Under jit, grad and vmap, with the hidden states, the head or the scalar traced."""
    h, w, t = arguments()
    with jax.checking_leaks():
        jax.jit(jax.grad(LOSSES[name], (0, 1, 2)))(h, w, t)
        jax.jit(jax.vmap(LOSSES[name], (0, None, None)))(h[None], w, t)
        jax.jit(lambda t: LOSSES[name](h, w, t))(t)


@pytest.mark.needs_jit
@each_function
@pytest.mark.slow
@pytest.mark.long
def test_functions_of_rows_keep_no_tracer(kernel, rng):
    with jax.checking_leaks():
        jax.jit(lambda *x: (kernel.function(*x), jax.grad(total(kernel))(*x)))(*easy(kernel, rng, (2, 5)))
