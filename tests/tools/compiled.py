"""Small programs with manually computed costs, compiled for a device that isn't there, for test_programs.py.

Each program has a function, arguments, and for each device the bytes that it moves and its operations. The bytes are
None if they depend on the arrays that a TPU keeps on its chip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bench import children, compilers

F32, BF16, S32 = jnp.float32, jnp.bfloat16, jnp.int32
N = 4096  # an array of N x N float32 is 64 MiB


class Program(NamedTuple):
    function: Callable
    arguments: list
    bytes: dict[str, float | None]
    operations: dict[str, dict[str, float]]


def both(h100, v5e=...):
    """A value for each device, the same for both unless two are given."""
    return {"h100": h100, "v5e": h100 if v5e is ... else v5e}


def square(dtype):
    return ((N, N), dtype)


def scanned(x, w):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]


def updated(x, u):
    """Updates a block of rows per step, in place. The argument is copied before the loop."""
    return lax.fori_loop(0, 16, lambda i, x: lax.dynamic_update_slice(x, jnp.sin(u) * i, (i * 8, 0)), x)


def one_of(p, x, w):
    return lax.cond(p, lambda: jnp.sin(x) @ w, lambda: x)


def matmul(precision=None, out=None):
    return lambda x, w: jnp.matmul(x, w, precision=precision, preferred_element_type=out)


CUBE = 2 * N**3
PROGRAMS = {
    "elementwise": Program(lambda x: 2 * x + 1, [square(F32)], both(8 * N**2), both({})),
    "reduction": Program(lambda x: x.sum(-1), [square(F32)], both(4 * N**2), both({})),
    "product of bfloat16": Program(matmul(out=F32), [square(BF16), square(BF16)], both(8 * N**2), both({"bf16": CUBE})),
    "product of float32": Program(
        matmul(), [square(F32), square(F32)], both(12 * N**2), both({"tf32": CUBE}, {"bf16": CUBE})
    ),
    "at high precision": Program(
        matmul("high"), [square(F32), square(F32)], both(12 * N**2), both({"tf32": CUBE}, {"bf16": 3 * CUBE})
    ),
    "at the highest": Program(
        matmul("highest"), [square(F32), square(F32)], both(12 * N**2), both({"f32": CUBE}, {"bf16": 6 * CUBE})
    ),
    "by an algorithm": Program(
        matmul(lax.DotAlgorithmPreset.BF16_BF16_F32_X3),
        [square(F32), square(F32)],
        both(12 * N**2),
        both({"bf16": 3 * CUBE}),
    ),
    "batched product": Program(
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w),
        [((16, 1024, 512), BF16), ((16, 512, 2048), BF16)],
        both(2 * 16 * (1024 * 512 + 512 * 2048 + 1024 * 2048)),
        both({"bf16": 2 * 16 * 1024 * 512 * 2048}),
    ),
    # On an H100 the carry is copied in each of the seven steps, and once before them.
    "scan of products": Program(
        scanned, [square(BF16), square(BF16)], both(37 * 2 * N**2, None), both({"bf16": 7 * CUBE})
    ),
    "conditional": Program(
        one_of, [((), jnp.bool_), square(BF16), square(BF16)], both(6 * N**2, None), both({"bf16": CUBE})
    ),
    "slice": Program(lambda x: 2 * x[64:128], [square(F32)], both(8 * 64 * N), both({})),
    "gather": Program(lambda x, i: 2 * x[i], [((64 * N, N), F32), ((64,), S32)], both(8 * 64 * N), both({})),
    "update in place": Program(
        updated, [((16 * 8, 64 * N), F32), ((8, 64 * N), F32)], both((2 * 16 + 16 * 2) * 8 * 64 * N * 4, None), both({})
    ),
    "padded": Program(
        lambda x: 2 * x, [((N * N // 16, 10, 9), F32)], both(8 * 90 * N**2 / 16, 8 * 144 * N**2 / 16), both({})
    ),
}


def main() -> None:
    device = children.todo()
    for name, program in PROGRAMS.items():
        children.tell(name, [compilers.compiled(jax.jit(program.function), device, program.arguments).as_text()])


if __name__ == "__main__":
    main()
