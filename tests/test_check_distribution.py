"""check_distribution raises eagerly, checks under checkify, and is silent under plain jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jce

GOOD = np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.in_turn(2)
def test_accepts_distributions(dtype, rng):
    p = jax.nn.softmax(jnp.asarray(rng.standard_normal((5, 1000)), dtype))
    assert jce.check_distribution(p) is None
    jce.check_distribution(p.T, axis=0)
    jce.check_distribution([0.5, 0.5])
    jce.check_distribution(np.zeros((0, 3), np.float32))


@pytest.mark.parametrize(
    ("p", "text"),
    [
        ([[0.5, 0.5], [0.25, 0.5], [0.5, 0.75]], "p[1] is not a distribution along axis=-1: its sum is 0.75 and its"),
        ([[0.5, 0.5], [0.4, 0.6], [0.5, 0.75]], "p[2] is not a distribution along axis=-1: its sum is 1.25 and its"),
        ([-0.25, 1.25], "p is not a distribution along axis=-1: its sum is 1 and its smallest entry -0.25"),
        pytest.param(
            [[[0.5, 0.5]], [[np.nan, 1.0]]],
            "p[1, 0] is not a distribution along axis=-1: its sum is nan",
            marks=pytest.mark.holds_nan,
        ),
        pytest.param([[2.0, 3.0], [np.nan, 1.0]], "p[1] is not", marks=pytest.mark.holds_nan),
        (np.zeros((2, 0)), "its sum is 0"),
    ],
)
@pytest.mark.in_turn(2)
def test_the_error_names_the_worst_row(p, text):
    with pytest.raises(ValueError, match=r"^check_distribution: ") as error:
        jce.check_distribution(np.asarray(p, np.float32))
    assert text in str(error.value)
    assert "Normalize it" in str(error.value)


def test_atol():
    p = np.array([0.5, 0.501], np.float32)
    with pytest.raises(ValueError, match=r"its sum is 1\.00"):
        jce.check_distribution(p)
    jce.check_distribution(p, atol=0.01)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"its sum is 1\.0000001"):
        jce.check_distribution(np.array([0.5, 0.5000001]))


def test_default_atol_is_the_root_of_epsilon():
    jce.check_distribution(np.float32([0.5, 0.5003]))
    with pytest.raises(ValueError, match=r"with atol=0\.000345"):
        jce.check_distribution(np.float32([0.5, 0.5005]))


@pytest.mark.parametrize("atol", [-1, float("nan")])
def test_wrong_atol(atol):
    with pytest.raises(ValueError, match=r"^check_distribution: atol must be a number ≥ 0; got atol="):
        jce.check_distribution([0.5, 0.5], atol=atol)


@pytest.mark.parametrize("p", [np.float32(0.5), np.array([1j]), [[0.5], [0.5, 0.5]], "abc", None])
def test_wrong_arguments(p):
    with pytest.raises((TypeError, ValueError), match=r"^check_distribution: p must"):
        jce.check_distribution(p)


@pytest.mark.needs_jit
@pytest.mark.slow
def test_under_transformations():
    def loss(p):
        jce.check_distribution(p)
        return jce.entropy(p).sum()

    bad = GOOD * np.array([[1], [2]], np.float32)
    jax.jit(loss)(bad)
    jax.grad(loss)(bad)
    checked = checkify.checkify(jax.jit(loss), errors=checkify.user_checks)
    error, _ = checked(GOOD)
    error.throw()
    error, _ = checked(bad)
    with pytest.raises(checkify.JaxRuntimeError, match=r"row 1 of the batch.*its sum is 2.0"):
        error.throw()
    error, _ = checkify.checkify(jax.vmap(jce.check_distribution), errors=checkify.user_checks)(bad)
    with pytest.raises(checkify.JaxRuntimeError, match=r"p is not a distribution"):
        error.throw()
