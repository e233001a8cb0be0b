"""A model of the time that a step of the sharded head takes on 8 to 4096 devices: `python -m bench.devices`.

For N tokens, width d and n classes on a mesh of T × K devices (tokens × classes), value and gradient of
`jce.on_mesh(jce.linear_cross_entropy, ...)` take 6Ndn/TK multiplications and additions per device, and all-reduce

    over K   3 numbers per token (of the device's N/T), chunk by chunk; once, the hidden states' gradient, N/T × d
    over T   once, the head's gradient, n/K × d

An all-reduce in a ring of p devices sends and receives 2(p-1)/p of the array. `check` reads the programs that XLA
compiles for eight CPU devices, and confirms that they send nothing else. The speed of devices and links is an
assumption, which you can set.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.hlo import collectives
from jce._programs.command_line import Parser, run

TOKENS, WIDTH, CLASSES, CHUNK = 4 * 2**20, 8192, 262_144, 2048
NUMBERS_A_TOKEN = 3  # the maximum, the sum and the label's logit
LOOP_REDUCTIONS = 2  # one for the maximum, and one for the other two


class Sent(NamedTuple):
    """How many numbers of each array a device all-reduces."""

    in_loop: int  # over the axis of the classes, in all chunks together
    hidden: int  # over the axis of the classes
    head: int  # over the axis of the tokens


def sent(tokens: int, width: int, classes: int, t: int, k: int) -> Sent:
    over_classes, over_tokens = k > 1, t > 1
    return Sent(
        over_classes * NUMBERS_A_TOKEN * (tokens // t),
        over_classes * (tokens // t) * width,
        over_tokens * (classes // k) * width,
    )


def check(tokens: int, width: int, classes: int, t: int, k: int, chunk: int) -> Sent:
    """The same numbers as `sent`, read from the compiled program. JAX must have t · k devices."""
    mesh = jax.make_mesh((t, k), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2)

    def abstract(shape, axis, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(axis)))

    cross_entropy = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="tokens", class_axis="classes")

    def loss(hidden, head, labels):
        return cross_entropy(labels, hidden, head, chunk_size=chunk)

    hidden, head = abstract((tokens, width), "tokens"), abstract((classes, width), "classes")
    labels = abstract((tokens,), "tokens", np.int32)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, labels).compile()
    found = collectives(program.as_text())
    assert {c.kind for c in found} <= {"all-reduce"}
    chunks = math.ceil(tokens // t / chunk)
    once = [c.size for c in found if not c.in_loop and c.size > 1]  # the loss itself has size 1
    sizes = {name: n for name, n in sent(tokens, width, classes, t, k)._asdict().items() if name != "in_loop"}
    assert sorted(once) == sorted(n for n in sizes.values() if n), (once, sizes)
    return Sent(chunks * sum(c.size for c in found if c.in_loop), **sizes)


class Step(NamedTuple):
    t: int
    k: int
    compute: float  # seconds
    loop: float
    hidden: float
    head: float

    @property
    def total(self) -> float:
        return self.compute + self.loop + self.hidden + self.head


def step(t: int, k: int, *, flops: float, bandwidth: float, latency: float) -> Step:
    """The times of a step in seconds, if nothing overlaps."""
    numbers = sent(TOKENS, WIDTH, CLASSES, t, k)

    def ring(size, p):
        return 2 * (p - 1) / p * 4 * size / bandwidth + 2 * (p - 1) * latency * (size > 0)

    chunks = math.ceil(TOKENS / t / CHUNK)
    return Step(
        t,
        k,
        6 * TOKENS * WIDTH * CLASSES / (t * k) / flops,
        # Small all-reduces go along a tree.
        (k > 1) * chunks * LOOP_REDUCTIONS * 2 * math.log2(k) * latency + 4 * numbers.in_loop / bandwidth,
        ring(numbers.hidden, k),
        ring(numbers.head, t),
    )


def best(devices: int, **machine: float) -> Step:
    """The fastest mesh t × k."""
    return min(
        (step(devices // k, k, **machine) for k in (2**i for i in range(13)) if k <= devices), key=lambda s: s.total
    )


def main() -> None:
    parser = Parser(prog="python -m bench.devices", description="Model the time of a step of a head on many devices.")
    add = parser.add_argument
    add(
        "--flops",
        type=float,
        default=4e14,
        help="Operations per second of a device (default: %(default)g, an assumption).",
    )
    add(
        "--bandwidth",
        type=float,
        default=5e10,
        help="Bytes per second of a link, each way (default: %(default)g, an assumption).",
    )
    add("--latency", type=float, default=1e-5, help="Seconds per hop (default: %(default)g, an assumption).")
    machine = vars(parser.parse_args())
    jax.config.update("jax_num_cpu_devices", 8)
    for t, k in ((8, 1), (4, 2), (2, 4), (1, 8)):
        sizes = (64, 8, 256, t, k)
        assert check(*sizes, chunk=4) == sent(*sizes), (t, k)
    print(f"{TOKENS:,} tokens, d = {WIDTH:,}, n = {CLASSES:,}, chunks of {CHUNK:,}; {machine}")
    print(
        "The sizes of all-reduces agree with programs compiled for 8 devices, as meshes of 8×1, 4×2, 2×4 and 1×8.\n"
        "Columns: the times of the matmuls and of three kinds of all-reduces: those in the loop over chunks,\n"
        "and those of the gradients of hidden states and head. The efficiency is the matmuls' share of the time.\n"
    )
    columns = ("tokens×classes", "matmuls", "loop", "hidden", "head", "efficiency")
    print(f"{'devices':>8}" + "".join(f"{name:>15}" for name in columns))
    for devices in (2**i for i in range(3, 13)):
        s = best(devices, **machine)
        times = "".join(f"{1e3 * x:12.1f} ms" for x in (s.compute, s.loop, s.hidden, s.head))
        print(f"{devices:8}{f'{s.t}×{s.k}':>15}{times}{s.compute / s.total:15.0%}")


if __name__ == "__main__":
    run(main)
