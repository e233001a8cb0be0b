"""A `Linear` stands for logits: tokens can be selected, and operations that need the logits raise an error."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce

B, S, D, N = 3, 6, 4, 10


@pytest.fixture(params=["a matrix", "a function"])
def x(request, rng):
    h, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, S, D), (N, D)))
    return jce.Linear(h, w if request.param == "a matrix" else lambda h: h @ w.T)


INDICES = {
    "the last": -1,
    "a slice": slice(2),
    "of all sequences": (slice(None), -1),
    "both": (1, slice(1, None, 2)),
    "all classes": (slice(None), slice(-1), slice(None)),
    "an ellipsis": (..., slice(-1), slice(None)),
    "only an ellipsis": ...,
    "none": (),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.in_turn(4)
def test_selecting_tokens(x, name):
    logits = jce.linear_map(lambda x: x, x)
    np.testing.assert_allclose(jce.linear_map(lambda x: x, x[INDICES[name]]), logits[INDICES[name]], rtol=1e-5)


OPERATORS = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
OPERANDS = {
    "a number": lambda: 2.0,
    "a NumPy array": lambda: np.ones(N, np.float32),
    "a NumPy number": lambda: np.float32(2),
    "a JAX array": lambda: jnp.ones(N, np.float32),
    "a Linear": lambda: jce.Linear(np.ones((B, S, D), np.float32), np.ones((N, D), np.float32)),
}


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", [*OPERATORS, *COMPARISONS, "divmod"])
def test_all_operators_raise(x, name, operand):
    """The other operand is a number or an array, on either side, traced or not. Mostly Python raises the error."""
    of, other = getattr(operator, name, divmod), OPERANDS[operand]()
    with pytest.raises(TypeError):
        of(x, other)
    with pytest.raises(TypeError):
        of(other, x)
    if operand == "a JAX array":
        for call in (lambda a: of(a, x), lambda a: of(x, a)):
            with pytest.raises(TypeError):
                jax.jit(call)(other)


REFUSED = {  # without our error, Python or NumPy would return a result, or JAX's error would not name the functions
    "==": lambda x: x == x,
    "!=": lambda x: x != x,
    "bool": bool,
    "np.asarray": np.asarray,
    "np.argmax": np.argmax,
    "np.stack": lambda x: np.stack([x]),
    "np.where": lambda x: np.where(True, x, 0.0),
    "np.shape": np.shape,
    "jnp.asarray": jnp.asarray,
    "jnp.tanh": jnp.tanh,
    "jnp.argmax": jnp.argmax,
    "jnp.where": lambda x: jnp.where(True, x, 0.0),
    "jnp.astype": lambda x: jnp.astype(x, jnp.float32),
    "jnp.shape": jnp.shape,
    "jax.nn.log_softmax": jax.nn.log_softmax,
    "another dtype": lambda x: x.astype(jnp.bfloat16),
    "classes": lambda x: x[..., :3],
    "a class": lambda x: x[0, 0, 0],
    "a mask": lambda x: x[np.ones((B, S), bool)],
    "a new axis": lambda x: x[..., None],
}


@pytest.mark.parametrize("name", REFUSED)
def test_operations_that_need_logits_are_rejected(x, name):
    """All operations raise the same error, which names the functions that accept a Linear."""
    with pytest.raises(
        TypeError, match=r"Linear: it stands for logits .*; got Linear\(hidden=.*jce\.linear_cross_entropy"
    ):
        REFUSED[name](x)


OTHERS = {  # Python or NumPy raise the error
    "-": operator.neg,
    "abs": abs,
    "float": float,
    "len": len,
    "hash": hash,
    "iteration": iter,
    "unpacking": lambda x: [*x],
    "in": lambda x: 1.0 in x,
    "a sum": sum,
    "np.exp": np.exp,
    "np.sum": np.sum,
    "np.max": np.max,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_raise(x, name):
    with pytest.raises(TypeError):
        OTHERS[name](x)


def test_no_attributes_of_arrays(x):
    for name in ("shape", "dtype", "mean", "T", "at"):
        assert not hasattr(x, name)
