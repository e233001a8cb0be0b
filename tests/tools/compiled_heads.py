"""Heads compiled for devices that aren't there, for test_head_programs.py: prints their texts and temporary memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench import children, compilers

TOKENS, WIDTH, CLASSES = 8192, 768, 50_257  # on one device
DEVICES = 8
LOCAL = (8192,), (8192, 2048), (32_064, 2048)  # on each of 2 × 4 devices: a quarter of 128,256 classes
DTYPES = jnp.int32, jnp.bfloat16, jnp.bfloat16


def mean(y, h, w):
    return jce.linear_cross_entropy(y, h, w)


def penalized(y, h, w):
    return jce.linear_cross_entropy(y, h, w, z_loss=1e-4)


def each(y, h, w):
    return jnp.square(jce.linear_cross_entropy(y, h, w, reduction="none")).mean()


def log_probs(y, h, w):
    return sum(jnp.square(x).mean() for x in jce.linear_log_probs(y, h, w))


def of_some(y, h, w):
    return jce.linear_cross_entropy(y, h, w, where=y >= 0)


LOSSES = {"mean": mean, "none": each, "log-probabilities": log_probs}


def gradient(loss):
    return lambda y, h, w: jax.value_and_grad(lambda *a: loss(y, *a), (0, 1))(h, w)


def shapes(tokens):
    return zip(((tokens,), (tokens, WIDTH), (CLASSES, WIDTH)), DTYPES, strict=True)


def sharded(device):
    """The loss of a head on 2 × 4 devices: the tokens are split over 2, the classes over 4."""
    mesh = Mesh(
        np.array(compilers.devices(device, DEVICES)).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    axes = {"mesh": mesh, "token_axis": "data", "class_axis": "model"}
    places = [NamedSharding(mesh, P(axis)) for axis in ("data", "data", "model")]
    split = [
        jax.ShapeDtypeStruct((length * mesh.shape[place.spec[0]], *rest), dtype, sharding=place)
        for (length, *rest), dtype, place in zip(LOCAL, DTYPES, places, strict=True)
    ]
    program = gradient(jce.on_mesh(jce.linear_cross_entropy, **axes))
    return jax.jit(program, out_shardings=(None, tuple(places[1:]))).lower(*split).compile()


def tell(name, program):
    children.tell(name, [program.as_text(), program.memory_analysis().temp_size_in_bytes])


def main() -> None:
    device = children.todo()
    tell("alone", compilers.compiled(gradient(mean), device, list(shapes(TOKENS))))
    if device in ("v6e", "tpu7x"):  # the compilers for these take longer
        return
    tell("value", compilers.compiled(penalized, device, list(shapes(TOKENS))))
    tell("penalized", compilers.compiled(gradient(penalized), device, list(shapes(TOKENS))))
    tell("sharded", sharded(device))
    tell("a part alone", compilers.compiled(gradient(mean), device, list(zip(LOCAL, DTYPES, strict=True))))
    tell("of some alone", compilers.compiled(gradient(of_some), device, list(shapes(TOKENS))))
    mesh = Mesh(np.array(compilers.devices(device, DEVICES)), ("data",), axis_types=(AxisType.Auto,))
    places = [NamedSharding(mesh, P(*spec)) for spec in (("data",), ("data",), ())]
    split = [jax.ShapeDtypeStruct(*s, sharding=p) for s, p in zip(shapes(DEVICES * TOKENS), places, strict=True)]
    with jax.set_mesh(mesh):
        for name, loss in {**LOSSES, "of some": of_some}.items():
            tell(name, jax.jit(gradient(loss), out_shardings=(None, tuple(places[1:]))).lower(*split).compile())


if __name__ == "__main__":
    main()
