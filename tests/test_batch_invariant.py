"""With batch_invariant=True, a token's results have the same bits alone and in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jce
from jce import Linear
from tests.optimized_jit import optimized_jit

TOKENS, CHUNK, TOKEN = 150, 32, 7
ce = jce.cross_entropy_with_integer_labels
# Functions of labels, hidden states [N, d], a head and options. They return one number per token, or a sum.
FUNCTIONS = {
    "losses": lambda y, h, w, **o: jce.linear_cross_entropy(y, h, w, reduction="none", z_loss=0.1, **o),
    "sum of losses": lambda y, h, w, **o: jce.linear_cross_entropy(y, h, w, reduction="sum", **o),
    "list": lambda y, h, w, **o: jce.linear_cross_entropy(
        y[:, None], h, w, label_probs=jnp.full((len(y), 1), 0.9, np.float32), reduction="none", **o
    ),
    "log-probabilities": lambda y, h, w, **o: jce.linear_log_probs(y, h, w, temperature=0.7, **o),
    "map": lambda y, h, w, **o: jce.linear_map(ce, y, Linear(h, w), **o),
    "sum of a map": lambda y, h, w, **o: jce.linear_map(ce, y, Linear(h, w), reduction="sum", **o),
    "divergence": lambda y, h, w, **o: jce.linear_kl_divergence(Linear(h, w), Linear(2 * h, w), reduction="none", **o),
}
SHAPES = [(17, 150, np.float32), (33, 257, jnp.bfloat16)]


@pytest.mark.needs_jit
@pytest.mark.parametrize(("width", "classes", "dtype"), SHAPES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.slow
def test_bits(name, width, classes, dtype, rng):
    """A token's results and gradient are the same alone, first, last, in another chunk, and with a traced mask."""
    h, w = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((TOKENS, width), (classes, width)))
    y = jnp.asarray(rng.integers(0, classes, TOKENS))

    @optimized_jit
    def run(y, h, kept=None):
        def results(h):
            return FUNCTIONS[name](y, h, w, where=kept, chunk_size=CHUNK, batch_invariant=True)

        gradient = jax.grad(lambda h: sum(x.sum() for x in jax.tree.leaves(results(h))))(h)
        return [x for x in (*jax.tree.leaves(results(h)), gradient) if x.ndim]

    def bits(results, at):
        return [np.asarray(x[at]).tobytes() for x in results]

    expected = bits(run(y, h), TOKEN)
    everywhere = [*range(TOKENS)]
    for places in ([TOKEN], [TOKEN, 1, 2], [2, 1, TOKEN], everywhere[TOKEN : TOKEN + CHUNK], everywhere[::-1]):
        at, some = places.index(TOKEN), jnp.asarray(places)
        assert bits(run(y[some], h[some]), at) == expected, places
        assert bits(run(y[some], h[some], jnp.arange(len(places)) % 2 == at % 2), at) == expected, places


@pytest.mark.needs_jit
def test_a_loop_of_one_step_stays_a_loop():
    """XLA would unroll such a loop, and fuse it differently from a loop of several steps."""
    y, h, w = jnp.zeros(1, int), jnp.ones((1, 4)), jnp.ones((5, 4))

    def loops(**options):
        entropies = optimized_jit(lambda y, h, w: jce.linear_log_probs(y, h, w, chunk_size=8, **options).entropy)
        return entropies.lower(y, h, w).compile().as_text().count(" while(")

    assert loops() == 0
    assert loops(batch_invariant=True) == 1


@pytest.mark.needs_jit
def test_chunks_are_always_full(rng):
    """Without the option, a chunk has no more tokens than the call. The option's default doesn't change the program."""
    h, w, y = jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.zeros(3, int)

    def text(**options):
        program = optimized_jit(lambda y, h, w: jce.linear_cross_entropy(y, h, w, chunk_size=16, **options))
        return program.lower(y, h, w).as_text()

    assert text() == text(batch_invariant=False)
    assert "tensor<16x5x" in text(batch_invariant=True)
    assert "tensor<16x5x" not in text()


@pytest.mark.parametrize(
    ("kind", "masked"), [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, False)], ids=str
)
@pytest.mark.in_turn(3)
def test_on_a_mesh(kind, masked, rng):
    """Each device fills up its own chunks. Values and gradients equal those on one device."""
    mesh = jax.make_mesh((2, 2), ("tokens", "classes"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    h, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((10, 4), (6, 4)))
    y, kept = rng.integers(0, 6, 10), np.arange(10) % 4 != 1 if masked else None

    def run(function, **options):
        def total(h, w):
            return jnp.sin(function(y, h, w, where=kept, reduction="none", chunk_size=4, **options)).sum()

        return optimized_jit(jax.value_and_grad(total, (0, 1)))(h, w)

    split = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="tokens", class_axis="classes")
    got, expected = run(split, batch_invariant=True), run(jce.linear_cross_entropy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)


def test_no_tokens():
    y, h, w = jnp.zeros(0, int), jnp.ones((0, 4)), jnp.ones((5, 4))
    options = {"chunk_size": 4, "batch_invariant": True}
    value, gradient = jax.value_and_grad(lambda w: jce.linear_cross_entropy(y, h, w, **options))(w)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    assert jce.linear_log_probs(y, h, w, **options).log_prob.shape == (0,)
    assert jce.linear_map(jnp.argmax, Linear(h, w), **options).shape == (0,)


def test_wrong_arguments():
    h, w, y = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32), np.zeros(3, int)
    for options, wants in (
        ({"batch_invariant": True}, "must come with a chunk_size"),
        ({"batch_invariant": 1, "chunk_size": 2}, "must be a static bool"),
    ):
        with pytest.raises(ValueError, match=f"linear_cross_entropy: batch_invariant {wants}"):
            jce.linear_cross_entropy(y, h, w, **options)
        with pytest.raises(ValueError, match=f"linear_map: batch_invariant {wants}"):
            jce.linear_map(ce, y, Linear(h, w), **options)
