"""Elementary functions are requested at XLA's highest accuracy. On a TPU, the default would be an approximation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from tests.jaxprs import equations
from tests.kernels import MODES, TABLE, easy, label, modes, total

pytestmark = pytest.mark.needs_jit

HIGHEST = jax.lax.AccuracyMode.HIGHEST
ELEMENTARY = {"exp", "log", "tanh", "logistic"}  # the last in the derivative of tanh
# Functions that XLA approximates and jce doesn't use. Before jce uses one, its accuracy on a TPU must be known.
OTHERS = {
    "exp2",
    "expm1",
    "log1p",
    "pow",
    "rsqrt",
    "cbrt",
    "sin",
    "cos",
    "tan",
    "atanh",
    "asinh",
    "acosh",
    "sinh",
    "cosh",
    "erf",
}
HEADS = {
    "sum": functools.partial(jce.linear_cross_entropy, reduction="sum"),
    "none": functools.partial(jce.linear_cross_entropy, reduction="none"),
    "options": functools.partial(jce.linear_cross_entropy, label_smoothing=0.1, z_loss=0.1, logit_soft_cap=2.0),
    "log-probabilities": functools.partial(jce.linear_log_probs, logit_soft_cap=2.0),
}


def asked(function, arguments, names) -> set[tuple]:
    """The elementary functions in the function's programs in some modes, on every platform, with their accuracy."""
    programs = modes(function, tuple(range(len(arguments))))
    traced = [jax.make_jaxpr(programs[name])(arguments, arguments).jaxpr for name in names]
    calls = [e for jaxpr in traced for e in equations(jaxpr, None) if e.primitive.name in ELEMENTARY | OTHERS]
    return {(e.primitive.name, e.params.get("accuracy")) for e in calls}


def each_mode(*quick):
    every = pytest.param(MODES, marks=pytest.mark.slow)
    return pytest.mark.parametrize("names", [quick, every], ids=["one mode", "every mode"])


@pytest.mark.parametrize("kernel", TABLE, ids=label)
@each_mode("forward over reverse")  # which computes the value and the gradient too
@pytest.mark.in_turn(6, "wide")
def test_functions(kernel, names, rng):
    found = asked(total(kernel), tuple(map(jnp.asarray, easy(kernel, rng, (2, 5)))), names)
    assert found
    assert found <= {(name, HIGHEST) for name in ELEMENTARY}


@pytest.mark.parametrize("head", HEADS)
@each_mode("gradient")
@pytest.mark.in_turn(4, "wide")
def test_heads(head, names):
    def of(h, w):
        return sum(x.sum() for x in jax.tree.leaves(HEADS[head](np.zeros(4, int), h, w)))

    found = asked(of, (jnp.ones((4, 2)), jnp.ones((3, 2))), names)
    assert {"exp", "log"} <= {name for name, _ in found}
    assert found <= {(name, HIGHEST) for name in ELEMENTARY}
