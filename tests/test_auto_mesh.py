"""The plain head when `jax.jit` splits tokens over a mesh with Auto axes, as in data-parallel training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.hlo import collectives
from tests.jaxprs import equations
from tests.kernels import modes

pytestmark = pytest.mark.needs_jit

WIDTH, CLASSES, CHUNK = 16, 40, 32
LOSSES = {
    "mean": lambda y, h, w: jce.linear_cross_entropy(y, h, w, chunk_size=CHUNK),
    "none": lambda y, h, w: jnp.square(jce.linear_cross_entropy(y, h, w, reduction="none", chunk_size=CHUNK)).mean(),
    "log-probabilities": lambda y, h, w: sum(
        jnp.square(x).mean() for x in jce.linear_log_probs(y, h, w, chunk_size=CHUNK)
    ),
    "masked mean": lambda y, h, w: jce.linear_cross_entropy(y, h, w, where=y > 9, chunk_size=CHUNK),
    "masked none": lambda y, h, w: jnp.square(
        jce.linear_cross_entropy(y, h, w, where=y > 9, reduction="none", chunk_size=CHUNK)
    ).mean(),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def split(rng, tokens, dtype=np.float32):
    y, h, w = (
        rng.integers(0, CLASSES, tokens),
        rng.standard_normal((tokens, WIDTH)),
        rng.standard_normal((CLASSES, WIDTH)),
    )
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh(), P(*spec)))  # noqa: E731
    return put(y.astype(np.int32), "data"), put(h.astype(dtype), "data"), put(w.astype(dtype))


@pytest.mark.parametrize(("tokens", "size", "on_one", "on_eight"), [(2**14, None, 32, 4), (720, 90, 8, 9)])
def test_a_chunk_has_the_tokens_of_all_devices(tokens, size, on_one, on_eight):
    """A chunk has 512 tokens per device on a CPU. So 16,384 tokens make 4 chunks on 8 devices, and 32 on one device.
    720 tokens are not 8 chunks of 8 equal parts, but they are 9."""
    y = jax.ShapeDtypeStruct((tokens,), np.int32)
    h, w = (jax.ShapeDtypeStruct((length, WIDTH), np.float32) for length in (tokens, 2**11))

    def steps():
        jaxpr = jax.make_jaxpr(lambda *x: jce.linear_cross_entropy(*x, chunk_size=size))(y, h, w).jaxpr
        return [e.params["length"] for e in equations(jaxpr) if e.primitive.name == "scan"]

    assert steps() == [on_one]
    with jax.set_mesh(mesh()):
        assert steps() == [on_eight]


@pytest.mark.parametrize("tokens", [256, 72])  # equal chunks on each device, and padded chunks
@each_loss
@pytest.mark.slow
def test_results_equal_those_on_one_device(platform, loss, tokens, rng):
    """Values, gradients and Hessian-vector products equal those on one device, in float64."""
    with jax.enable_x64(True):
        y, *numbers = split(rng, tokens, np.float64)
        numbers, directions = tuple(numbers), tuple(rng.standard_normal(x.shape) for x in numbers)

        def everything(y, a, t):
            programs = modes(lambda *a: loss(y, *a), (0, 1))
            return [programs[mode](a, t) for mode in ("gradient", "forward over reverse", "reverse over reverse")]

        with jax.set_mesh(mesh()):
            got = jax.jit(everything)(y, numbers, directions)
        alone = jax.jit(everything)(*jax.tree.map(np.asarray, (y, numbers, directions)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, alone)


@each_loss
@pytest.mark.in_turn(6)
def test_communication(platform, loss, rng):
    """Devices send a few numbers per token of a chunk, the head's gradient and, before the loop, one hidden state."""
    y, *numbers = split(rng, 256)
    with jax.set_mesh(mesh()):
        program = jax.jit(lambda y, *a: jax.value_and_grad(lambda *a: loss(y, *a), (0, 1))(*a))
        sent = collectives(program.lower(y, *numbers).compile().as_text())
    gathered = [x.size for x in sent if x.kind != "all-reduce"]
    if platform == "accelerator":
        assert not gathered
    assert max(gathered, default=0) <= 2 * CHUNK  # labels and their positions, on a CPU
    assert {x.size for x in sent if x.kind == "all-reduce" and (x.in_loop or x.size != WIDTH)} <= {1, CLASSES * WIDTH}


def test_a_chunk_has_as_many_tokens_per_device_as_on_one_device(platform):
    """The mesh must be set. Otherwise, JAX doesn't reveal that there is a mesh."""
    shapes = jax.ShapeDtypeStruct((2**15,), np.int32), jax.ShapeDtypeStruct((2**15, 2), np.float32)

    def lengths():
        text = jax.jit(jce.linear_cross_entropy).lower(*shapes, jax.ShapeDtypeStruct((2**16, 2), np.float32)).as_text()
        return {size for size in (512, 2048, 8 * 512, 8 * 2048) if f"tensor<{size}x{2**16}xf32>" in text}

    one = 512 if platform == "cpu" else 2048
    assert lengths() == {one}
    with jax.set_mesh(mesh()):
        assert lengths() == {8 * one}
