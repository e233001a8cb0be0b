"""One of several processes that train together: `python worker.py COORDINATOR PROCESSES ID [stall]`.

They train a small model with a sharded head for a few steps of gradient descent, on a mesh of all processes' devices.
Each process prints the losses, and the sum of squares of the final head, as JSON. With `stall`, process 1 stops
before its second step and waits to be killed.
"""

import json
import sys
import time

import jax
import numpy as np

coordinator, processes, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stalls = sys.argv[4:] == ["stall"] and number == 1
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, number, initialization_timeout=60, heartbeat_timeout_seconds=10)

from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jce  # noqa: E402

TOKENS, INPUTS, D, CLASSES, STEPS = 24, 7, 6, 20, 4


def main():
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def put(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    inputs = put(rng.standard_normal((TOKENS, INPUTS)).astype(np.float32), P("data"))
    labels = put(rng.integers(0, CLASSES, TOKENS).astype(np.int32), P("data"))
    where = put(np.arange(TOKENS) % 11 > 0, P("data"))  # the two halves keep different numbers of tokens
    layer = put(rng.standard_normal((INPUTS, D)).astype(np.float32), P())
    head = put(rng.standard_normal((CLASSES, D)).astype(np.float32), P("model"))

    cross_entropy = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="data", class_axis="model")

    @jax.jit
    def step(layer, head, labels, inputs, where):
        def loss(layer, head):
            hidden = jax.numpy.tanh(inputs @ layer)
            return cross_entropy(labels, hidden, head, where=where, chunk_size=5)

        value, (g, h) = jax.value_and_grad(loss, (0, 1))(layer, head)
        return value, layer - g, head - h

    losses = []
    for i in range(STEPS):
        if stalls and i == 1:
            print("stalled", flush=True)
            time.sleep(600)
        value, layer, head = step(layer, head, labels, inputs, where)
        losses.append(float(value))
    print(json.dumps([*losses, float(jax.jit(lambda x: (x * x).sum())(head))]), flush=True)


main()
