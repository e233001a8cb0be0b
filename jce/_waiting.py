"""A program that waits for its platform: a function of arrays, traced where it is lowered, and for that platform alone.

The platform is known when a program is lowered, not when it is traced: it may be compiled for another machine, or
exported for several. Its derivatives and batches are such programs too, so that in every nesting one way is traced. A
program is hashable, and the same each time, so that what was traced of it is found again: a frozen dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir
from jax.lax import mul_p
from jax.sharding import AbstractMesh

Primitive = type(mul_p)  # `jax.extend.core.Primitive`, without the import of Pallas that comes with it
_waiting_p = Primitive("waiting")
_waiting_p.multiple_results = True
PLATFORMS = ("cpu", "tpu", None)  # as JAX names them; None for all others


def waiting(program: Callable, *arrays: Any) -> Any:
    """program(platform, *arrays), a tree of arrays whose types are the same on each of the PLATFORMS."""
    leaves, tree = jax.tree.flatten(arrays)
    return _bind(_OfTrees(program, tree), Settings.now(), *map(jnp.asarray, leaves))


class Settings(NamedTuple):
    """What of JAX a trace depends on, as it was where the program was called; so a trace is found again too."""

    x64: bool
    precision: Any
    dtype_promotion: str
    rank_promotion: str
    mesh: AbstractMesh

    @classmethod
    def now(cls) -> Settings:
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
class _OfTrees:
    of: Callable
    tree: Any

    def __call__(self, platform, *leaves):
        return self.of(platform, *self.tree.unflatten(leaves))


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """Of the primals and of some of their tangents: the results' tangents, where they have one."""

    of: Callable
    live: tuple[int, ...]

    def __call__(self, platform, *arrays):
        primals, tangents = arrays[: -len(self.live)], arrays[-len(self.live) :]

        def of_live(*values):
            arguments = list(primals)
            for i, x in zip(self.live, values, strict=True):
                arguments[i] = x
            return [r for r in jax.tree.leaves(self.of(platform, *arguments)) if _has_tangent(r)]

        return jax.jvp(of_live, [primals[i] for i in self.live], list(tangents))[1]


@dataclasses.dataclass(frozen=True)
class _Cotangent:
    """Of the results' cotangents and of the arguments but some, in which a program is linear: their cotangents."""

    of: Callable
    live: tuple[int, ...]
    types: tuple  # of these
    results: int

    def __call__(self, platform, *arrays):
        cotangents, known = arrays[: self.results], arrays[self.results :]

        def of_live(*values):
            arguments = list(known)
            for i, x in zip(self.live, values, strict=True):  # in order, each in its place among the others
                arguments.insert(i, x)
            return jax.tree.leaves(self.of(platform, *arguments))

        return jax.linear_transpose(of_live, *self.types)(list(cotangents))


@dataclasses.dataclass(frozen=True)
class _Batched:
    of: Callable
    axes: tuple[int | None, ...]

    def __call__(self, platform, *arrays):
        return jax.vmap(functools.partial(self.of, platform), self.axes)(*arrays)


def _has_tangent(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


# Their primitive


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _traced(program, platform, *arrays):
    """Once for each platform and type of arrays, whoever asks: JAX keeps what a jit has traced."""
    return program(platform, *arrays)


def _types(program, settings, *avals):
    """The results' types, and their tree, as a CPU's program has them."""
    with settings.again():
        return jax.make_jaxpr(_traced, static_argnums=(0, 1), return_shape=True)(program, "cpu", *avals)


def _bind(program: Callable, settings: Settings, *leaves: Array) -> Any:
    _, results = _types(program, settings, *map(jax.typeof, leaves))
    return jax.tree.unflatten(jax.tree.structure(results), _waiting_p.bind(*leaves, program=program, settings=settings))


def _differentiate(primals, tangents, *, program, settings):
    results = _waiting_p.bind(*primals, program=program, settings=settings)
    live = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    steps = iter(_bind(_Tangent(program, live), settings, *primals, *(tangents[i] for i in live)))
    zeros = (ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results)
    return results, [next(steps) if _has_tangent(r) else zero for r, zero in zip(results, zeros, strict=True)]


def _transpose(cotangents, *arrays, program, settings):
    live = tuple(i for i, x in enumerate(arrays) if ad.is_undefined_primal(x))
    known = [x for i, x in enumerate(arrays) if i not in live]
    back = _Cotangent(program, live, tuple(arrays[i].aval for i in live), len(cotangents))
    results = iter(_bind(back, settings, *map(ad.instantiate_zeros, cotangents), *known))
    return [next(results) if i in live else None for i in range(len(arrays))]


def _batch(arrays, axes, *, program, settings):
    results = _bind(_Batched(program, tuple(axes)), settings, *arrays)
    return jax.tree.leaves(results), [0] * len(jax.tree.leaves(results))


def _lowering(platform: str | None):
    def run(*arrays, program, settings):
        with settings.again():
            return jax.tree.leaves(_traced(program, platform, *arrays))

    return mlir.lower_fun(run, multiple_results=True)


_jitted = jax.jit(lambda *arrays, **static: _waiting_p.bind(*arrays, **static), static_argnames=("program", "settings"))


@_waiting_p.def_impl
def _run(*arrays, **static):
    with jax.disable_jit(False):  # in which it would run itself
        return _jitted(*arrays, **static)


_waiting_p.def_abstract_eval(lambda *avals, program, settings: _types(program, settings, *avals)[0].out_avals)
ad.primitive_jvps[_waiting_p] = _differentiate
ad.primitive_transposes[_waiting_p] = _transpose
batching.primitive_batchers[_waiting_p] = _batch
for _platform in PLATFORMS:
    mlir.register_lowering(_waiting_p, _lowering(_platform), platform=_platform)
