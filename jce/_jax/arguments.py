"""Checks of single arguments (arrays, numbers and options), and texts for errors.

All checks are static. They cost nothing at run time, and raise their errors while tracing. Rows of classes are checked
in `rows.py`, and arguments that only functions of heads take are checked in `_heads`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

SHARE = "Pass the fraction of the target probability that is spread over all classes, such as 0.1."


def fraction(function: str, dtype, *, ends: bool = True, advice: str = SHARE, **option: Any) -> float | Array:
    """A traced number, or a Python number from 0 to 1. Without `ends`, it must be above 0 and below 1 in this dtype."""
    ((name, value),) = option.items()
    if is_array(value):
        return _traced(function, dtype, name, value)
    if is_number(value) and 0 <= value <= 1 and (ends or np.finfo(dtype).tiny <= np.asarray(value, dtype) < 1):
        return float(value)
    range_ = "from 0 to 1" if ends else f"above 0 and below 1 in {np.dtype(dtype)}"
    raise ValueError(f"{function}: {name} must be a number {range_}; got {name}={value!r}. {advice}")


def positive(function: str, dtype, *, or_zero: bool = False, **option: Any) -> float | Array:
    """A traced number, or a Python number greater than 0 (or 0, with `or_zero`). It must be in the normal range of
    float32: outside of this range, it might become 0 or ∞ in the program."""
    ((name, value),) = option.items()
    if is_array(value):
        return _traced(function, dtype, name, value)
    least, most = map(float, (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    required, bound = "", "at least 0" if or_zero else "greater than 0"
    if not is_number(value) or value != value:
        required = f"a number that is {bound}"
    elif value < 0 or (value == 0 and not or_zero):
        required = bound
    elif value and not least <= value <= most:
        zero = "0, or " if or_zero else ""
        required = f"{zero}from {least:.2g} to {most:.2g}, beyond which float32 rounds to 0 or infinity"
    if required:
        raise ValueError(f"{function}: {name} must be {required}; got {name}={value!r}. Omit {name} to switch it off.")
    return float(value)


def is_array(value) -> TypeGuard[Array]:
    """Whether a number is an array, traced or not. If so, its value isn't checked, and no branch depends on it."""
    return isinstance(value, Array | np.ndarray)


def is_function(head: Any) -> bool:
    """Whether a head is a function. If `jnp.asarray` accepts it, it is a matrix, even if it is callable, as in Flax.

    A module may have a shape and a dtype (Tunix's `Einsum` has both), but only an array has `ndim` too.
    """
    is_matrix = hasattr(head, "__jax_array__") or all(hasattr(head, name) for name in ("shape", "dtype", "ndim"))
    return callable(head) and not is_matrix


def _traced(function: str, dtype, name: str, value: Array) -> Array:
    """The value, after a check that its shape is (), cast to this dtype. So, like a Python number, it never widens
    other arrays."""
    if value.ndim or value.dtype == bool or not is_real(value):
        raise ValueError(
            f"{function}: {name} must be a real number, or a real array of shape (); got {described({name: value})}."
            f" To use several values at once, use jax.vmap."
        )
    _require_wide(function, {name: value})
    return jnp.asarray(value, dtype)


def as_number(function: str, name: str, value: Any) -> Any:
    """The value. It becomes an array if it is a list, a tuple, or an object that JAX takes as an array, such as a
    parameter of Flax."""
    is_one = isinstance(value, list | tuple) or (hasattr(value, "__jax_array__") and not is_array(value))
    return as_array(function, name, value) if is_one else value


def integer(value: Any) -> int | None:
    """The value as an int if it is a static integer of Python or NumPy, otherwise None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def require_bool(function: str, **option: Any) -> None:
    """Raises an error unless the option is True or False. Python would also accept an array, 0, 1 or a string."""
    ((name, value),) = option.items()
    if not isinstance(value, bool):
        raise ValueError(f"{function}: {name} must be a static bool; got {name}={value!r}. Pass True or False.")


def choice(function: str, *, choices: tuple[str, ...], **option: str) -> str:
    """The value of the option, after a check that it is one of the choices."""
    ((name, value),) = option.items()
    if not isinstance(value, str) or value not in choices:
        words = " or ".join(f'"{word}"' for word in choices)
        raise ValueError(f"{function}: {name} must be {words}; got {name}={value!r}.")
    return value


def is_number(value) -> TypeGuard[float]:
    """Whether value is a real number of Python or NumPy, and not a bool."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def as_floats(function: str, arguments: Mapping[str, ArrayLike]) -> list[Array]:
    """The arguments as arrays of the widest floating dtype among them, at least float32. Python scalars never widen."""
    dtype = float_dtype(function, arguments)
    return [as_array(function, name, x).astype(dtype) for name, x in arguments.items()]


def float_dtype(function: str, arguments: Mapping[str, ArrayLike]):
    """float64 if one of the arguments is float64, otherwise float32."""
    arrays = [as_array(function, name, x) for name, x in arguments.items()]
    if not all(map(is_real, arrays)):
        raise TypeError(
            f"{function}: {joined(arguments)} must be real (floating-point, integer or bool);"
            f" got {described(arguments)}. Convert to real numbers first."
        )
    _require_wide(function, arguments)
    strong = [x.dtype for x in arrays if not x.weak_type]
    double = jnp.float64 in (strong or [jnp.result_type(float)])
    return jnp.float64 if double else jnp.float32


def _require_wide(function: str, arguments: Mapping[str, ArrayLike]) -> None:
    """Raises an error for floats of 8 bits or fewer. Values would be correct, but a gradient has the dtype of its
    argument, and would mostly be rounded to 0. Integers have no gradient, so their width doesn't matter.
    """
    dtypes = {name: as_array(function, name, x).dtype for name, x in arguments.items()}
    narrow = [name for name, t in dtypes.items() if jnp.issubdtype(t, jnp.floating) and t.itemsize < 2]
    if narrow:
        raise TypeError(
            f"{function}: {joined(narrow)} must have at least 16 bits if floating-point, since a gradient has the dtype"
            f" of its argument, and would be rounded to 0 in fewer bits; got {described(arguments)}. Upcast first, for"
            f" example with {narrow[0]}.astype(jnp.bfloat16), and differentiate with respect to the result."
        )


def is_real(x) -> bool:
    """Whether x is floating-point, integer or bool."""
    return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool


def as_array(function: str, name: str, x: Any) -> Array:
    try:
        if x is None:
            raise TypeError
        # An array is returned as it is. Under an eager gradient, asarray would be an operation, at which jax_debug_nans
        # would stop for a NaN that `where` masks.
        return x if isinstance(x, Array) else jnp.asarray(x)
    except (TypeError, ValueError):
        taken_by = getattr(x, "_taken_by", None)  # a `Linear` isn't an array, and names the functions that accept it
        advice = taken_by(function, name) if taken_by else "Pass a value that jnp.asarray accepts."
        raise TypeError(
            f"{function}: {name} must be an array, a number or nested lists of numbers of equal lengths;"
            f" got {name}: {type(x).__name__}. {advice}"
        ) from None


def require_boolean(function: str, where: Array, got: Mapping[str, ArrayLike]) -> None:
    if where.dtype != bool:
        raise TypeError(f"{function}: where must be boolean; got {described(got)}. Pass where=mask != 0.")


def broadcasts_to(shape: tuple[int, ...], given: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, given) == shape
    except ValueError:
        return False


def joined(arguments: Iterable[str]) -> str:
    return " and ".join(arguments)


def brief(x: Any) -> str:
    """The dtype and shape of an array."""
    return f"{x.dtype}{list(x.shape)}"


def described(arguments: Mapping[str, ArrayLike | jax.ShapeDtypeStruct]) -> str:
    types = {name: jax.eval_shape(jnp.asarray, x) for name, x in arguments.items()}
    return ", ".join(f"{name}: {x.dtype}[{','.join(map(str, x.shape))}]" for name, x in types.items())
