"""Heads compiled for devices that aren't there, for tests/test_head_programs.py: prints their texts and temporaries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench import children, compilers

TOKENS, WIDTH, CLASSES = 8192, 768, 50_257  # of one device
DEVICES = 8


def mean(y, h, w):
    return jce.linear_cross_entropy(y, h, w)


def each(y, h, w):
    return jnp.square(jce.linear_cross_entropy(y, h, w, reduction="none")).mean()


def log_probs(y, h, w):
    return sum(jnp.square(x).mean() for x in jce.linear_log_probs(y, h, w))


LOSSES = {"mean": mean, "none": each, "log-probabilities": log_probs}


def gradient(loss):
    return lambda y, h, w: jax.value_and_grad(lambda *a: loss(y, *a), (0, 1))(h, w)


def shapes(tokens):
    return ((tokens,), jnp.int32), ((tokens, WIDTH), jnp.bfloat16), ((CLASSES, WIDTH), jnp.bfloat16)


def main() -> None:
    device = children.todo()
    program = compilers.compiled(gradient(mean), device, list(shapes(TOKENS)))
    children.tell("alone", [program.as_text(), program.memory_analysis().temp_size_in_bytes])
    mesh = Mesh(np.array(compilers.devices(device, DEVICES)), ("data",), axis_types=(AxisType.Auto,))
    places = [NamedSharding(mesh, P(*spec)) for spec in (("data",), ("data",), ())]
    split = [jax.ShapeDtypeStruct(*s, sharding=p) for s, p in zip(shapes(DEVICES * TOKENS), places, strict=True)]
    with jax.set_mesh(mesh):
        for name, loss in LOSSES.items():
            program = jax.jit(gradient(loss), out_shardings=(None, tuple(places[1:]))).lower(*split).compile()
            children.tell(name, [program.as_text(), program.memory_analysis().temp_size_in_bytes])


if __name__ == "__main__":
    main()
