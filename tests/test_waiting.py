"""Programs that wait for their platform: they are traced for that platform only, under the settings of the call."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from jce._jax.waiting import waiting
from tests.kernels import modes

pytestmark = pytest.mark.needs_jit


@dataclasses.dataclass(frozen=True)
class Program:
    """A sum and a product, which differ between platforms by a factor."""

    name: str
    traced_for: ClassVar[list] = []

    def __call__(self, platform, x, y):
        self.traced_for.append(platform)
        factor = {"cpu": 1, "tpu": 2, None: 3}[platform]
        return {"sum": (x + y).sum(-1), "product": factor * jnp.sin(x) * jnp.exp(y), "integer": x.argmax(-1)}


def plain(x, y):
    return {"sum": (x + y).sum(-1), "product": jnp.sin(x) * jnp.exp(y), "integer": x.argmax(-1)}


def total(function):
    def of(x, y):
        results = function(x, y)
        return jnp.square(results["sum"]).sum() + (results["product"] ** 3).sum()

    return of


def test_only_necessary_platforms_are_traced():
    program, a = Program("alone"), jnp.ones(3)
    Program.traced_for.clear()
    traced = jax.jit(lambda x: waiting(program, x, x)["product"]).trace(a)
    assert Program.traced_for == ["cpu"]
    for platforms, more in ((("cpu",), []), (("cuda",), [None]), (("tpu",), ["tpu"])):
        Program.traced_for.clear()
        traced.lower(lowering_platforms=platforms)
        assert Program.traced_for == more
    exported = jax.export.export(
        jax.jit(lambda x: waiting(program, x, x)["product"]), platforms=["cpu", "cuda", "tpu"]
    )(a)
    np.testing.assert_allclose(exported.call(a), jnp.sin(a) * jnp.exp(a), rtol=1e-6)


@pytest.mark.slow
def test_every_nesting_equals_the_plain_function(rng):
    """Eight modes up to the third order, for one call, in a loop and in a batch."""
    a, t = (tuple(rng.standard_normal((2, 4, 3))) for _ in range(2))
    program = Program("nested")

    def ours(x, y):
        return waiting(program, x, y)

    def everything(function):
        loss = total(function)
        looped = total(lambda x, y: jax.lax.map(lambda row: function(*row), (x, y)))
        batched = total(jax.vmap(function, (0, 0)))
        return {
            (name, kind): of(a, t)
            for kind, f in {"alone": loss, "looped": looped, "batched": batched}.items()
            for name, of in modes(f, (0, 1)).items()
        }

    with jax.enable_x64(True):
        got, expected = (jax.jit(lambda f=f: everything(f))() for f in (ours, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), got, expected)
    one = jax.vmap(ours, (0, None))(jnp.float32(a[0]), jnp.float32(a[1][0]))
    np.testing.assert_allclose(one["product"], np.sin(a[0]) * np.exp(a[1][:1]), rtol=1e-5)
    assert jax.jit(jax.hessian(lambda x: ours(x, x)["product"].sum()))(jnp.ones(3)).shape == (3, 3)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Linear in the first and in the last of its arguments."""

    def __call__(self, platform, s, x, t):
        return s * jnp.exp(x) + x * t


def test_a_program_is_transposed_in_its_linear_arguments(rng):
    s, x, t, ct = rng.standard_normal((4, 3)).astype(np.float32)
    got = jax.jit(jax.linear_transpose(lambda s, t: waiting(Weighted(), s, x, t), s, t))(ct)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), list(got), [ct * np.exp(x), ct * x])


def test_settings_are_those_of_the_call():
    """When a program is lowered, JAX may have other settings than when it was called."""
    with jax.enable_x64(True):
        traced = jax.jit(jce.entropy).trace(np.ones((2, 3)) / 3)
    lowered = traced.lower()
    assert "f64" in lowered.as_text()
    with jax.numpy_dtype_promotion("standard"):
        traced = jax.jit(lambda x: waiting(Mixed(), x)).trace(np.ones(3, np.float32))
    assert traced.lower().compile()(np.ones(3, np.float32)).tolist() == [2, 2, 2]


@dataclasses.dataclass(frozen=True)
class Mixed:
    def __call__(self, platform, x):
        return x + jnp.ones(3, jnp.bfloat16)


def test_jaxprs_are_short():
    """Before the platform is known, a jaxpr contains nothing of the kernel."""
    x = np.ones((4, 5), np.float32)
    functions = {
        jce.entropy_with_logits: (x,),
        jce.kl_divergence_with_logits: (x, x),
        jce.jensen_shannon_divergence_with_logits: (x, x),
        jce.cross_entropy_with_logits: (x, x),
    }
    for function, arguments in functions.items():
        gradient = jax.value_and_grad(lambda *a, f=function: f(*a).sum(), tuple(range(len(arguments))))
        assert len(str(jax.make_jaxpr(gradient)(*arguments)).splitlines()) < 200, function
