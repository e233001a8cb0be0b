"""Programs that wait for their platform: functions of arrays that are traced at lowering, for one platform only.

The platform isn't known earlier: a traced program may be compiled for another platform, or exported for several. The
derivatives and batched forms of a program wait too, so in every nesting only one platform's version is traced. A
program must be hashable, and equal each time it is made, so that JAX finds its trace in a cache. It is a frozen
dataclass or a `Program`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad
from jax.sharding import AbstractMesh

from jce._jax.primitives import primitive
from jce._jax.restricted import all_but, cotangent, linear_in, not_zero, spread, tangent, with_zeros

PLATFORMS = ("cpu", "tpu", None)  # as JAX names them; None for all others


def waiting(program: Callable, *arrays: Any) -> Any:
    """program(platform, *arrays): a pytree of arrays, whose types must be the same on all PLATFORMS."""
    leaves, tree = jax.tree.flatten(arrays)
    return _bind(Program(_of_trees, (program, tree)), JaxSettings.now(), *map(jnp.asarray, leaves))


def as_one(function: Callable, static: int = 0) -> Callable:
    """The function as one operation. Its last `static` arguments are static. checkify doesn't look into the operation.
    Otherwise it would report each NaN and each division by 0 that the function computes and then discards."""

    @functools.wraps(function)
    def of_all(*arguments):
        count = len(arguments) - static
        return waiting(Program(_on_any, (function, arguments[count:])), *arguments[:count])

    return of_all


def in_a_program() -> bool:
    """Whether operations are being traced, as under `jax.jit` or in a loop, instead of run one by one."""
    return isinstance(jax.device_put(0.0), jax.core.Tracer)  # an explicit transfer, which jax.transfer_guard allows


class JaxSettings(NamedTuple):
    """JAX's settings in the call of the program. At lowering they may have changed, so tracing restores them. As a
    parameter of the primitive, they also keep traces under different settings apart."""

    x64: bool
    precision: Any
    dtype_promotion: str
    rank_promotion: str
    mesh: AbstractMesh

    @classmethod
    def now(cls) -> JaxSettings:
        c: Any = jax.config
        return cls(
            c.jax_enable_x64,
            c.jax_default_matmul_precision,
            c.jax_numpy_dtype_promotion,
            c.jax_numpy_rank_promotion,
            jax.sharding.get_abstract_mesh(),
        )

    @contextlib.contextmanager
    def again(self):
        with (
            jax.enable_x64(self.x64),
            jax.default_matmul_precision(self.precision),
            jax.numpy_dtype_promotion(self.dtype_promotion),
            jax.numpy_rank_promotion(self.rank_promotion),
            jax.sharding.use_abstract_mesh(self.mesh),
        ):
            yield


# Programs


@dataclasses.dataclass(frozen=True)
class Program:
    """function(*static, platform, *arrays). Programs with equal functions and static arguments are equal."""

    function: Callable
    static: tuple

    def __call__(self, platform, *arrays):
        return self.function(*self.static, platform, *arrays)


def _on_any(function, static, platform, *arrays):
    return function(*arrays, *static)


def _of_trees(program, tree, platform, *leaves):
    return program(platform, *tree.unflatten(leaves))


def _tangent(program, live, platform, *arrays):
    return tangent(functools.partial(program, platform), live, *arrays)


def _cotangent(program, live, types, nonzero, platform, *arrays):
    return cotangent(functools.partial(program, platform), live, types, nonzero, *arrays)


def _batched(program, axes, platform, *arrays):
    return jax.vmap(functools.partial(program, platform), axes)(*arrays)


# The primitive


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _traced(program, platform, *arrays):
    """program(platform, *arrays). jit caches its traces, so it is traced once per platform and types of arrays."""
    return program(platform, *arrays)


def _types(program, settings, *avals):
    """The types of the results and their pytree, from a trace of the program for a CPU."""
    with settings.again():
        return jax.make_jaxpr(_traced, static_argnums=(0, 1), return_shape=True)(program, "cpu", *avals)


def _bind(program: Callable, settings: JaxSettings, *leaves: Array) -> Any:
    _, results = _types(program, settings, *map(jax.typeof, leaves))
    return jax.tree.unflatten(jax.tree.structure(results), _waiting_p.bind(*leaves, program=program, settings=settings))


def _differentiate(primals, tangents, *, program, settings):
    results = _waiting_p.bind(*primals, program=program, settings=settings)
    live = not_zero(tangents)
    steps = _bind(Program(_tangent, (program, live)), settings, *primals, *(tangents[i] for i in live))
    return results, with_zeros(results, steps)


def _transpose(cotangents, *arrays, program, settings):
    count, live = len(arrays), linear_in(arrays)
    types, nonzero = tuple(arrays[i].aval for i in live), tuple(range(len(cotangents)))
    known = (arrays[i] for i in all_but(count, live))
    back = Program(_cotangent, (program, live, types, nonzero))
    return spread(count, live, _bind(back, settings, *map(ad.instantiate_zeros, cotangents), *known))


def _batch(arrays, axes, *, program, settings):
    results = jax.tree.leaves(_bind(Program(_batched, (program, tuple(axes))), settings, *arrays))
    return results, [0] * len(results)


def _run(platform, *arrays, program, settings):
    with settings.again():
        return jax.tree.leaves(_traced(program, platform, *arrays))


_waiting_p = primitive(
    "waiting",
    {platform: functools.partial(_run, platform) for platform in PLATFORMS},
    _differentiate,
    _transpose,
    _batch,
    types=lambda *avals, program, settings: _types(program, settings, *avals)[0].out_avals,
    several=True,
    checked=False,
)
