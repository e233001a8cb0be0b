"""`public`: calls a function under `jax.jit`, with clear errors for arguments that it doesn't have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
from jax import Array

from jce._jax.arguments import as_array, as_number, is_array, is_function, require_bool
from jce._jax.primitives import primitive
from jce._jax.waiting import in_a_program

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Kind = inspect.Parameter

# Hints in errors for arguments that other libraries have: for functions of rows, for elementwise functions, and for
# functions of tokens. If there are several hints for an argument, the error has the first hint that names only
# arguments of the function.
OF_EACH = {
    "weights": (" Multiply the result instead.",),
    "weight": (
        " Multiply the result by weight for a weight per row, by weight[labels] for one per class.",
        " Multiply the result by weight.",
    ),
    "reduction": (" The result isn't reduced: take its .mean() or .sum().",),
}
ROWS = OF_EACH | {
    "mask": (" Write where=mask[..., None] for a mask of rows (if axis is -1), and where=mask for a mask of classes.",),
    "ignore_index": (" Mask rows with where=(labels != index)[..., None].",),
}
ELEMENTWISE = OF_EACH | {
    "mask": (" Write jnp.where(mask, result, 0).",),
    "where": (" Write jnp.where(where, result, 0).",),
}
TOKENS = {
    "mask": (" Mask tokens with where=mask.",),
    "weights": (" Multiply a field of the result instead, such as result.log_prob.",),
    "weight": (
        " Write weights=weight for a weight per token, weights=weight[labels] for one per class.",
        " Write weights=weight.",
        " Multiply a field of the result, such as result.log_prob, by weight for a weight per token, by weight[labels]"
        " for one per class.",
    ),
    "ignore_index": (" Mask tokens with where=labels != index.",),
    "reduction": (" The result isn't reduced: take the .mean() or .sum() of a field, such as result.log_prob.",),
}


# Hints in errors for values that can't be static because they aren't hashable
A_VALUE = "Pass a Python value: for an array x, x.item(), outside of jax.jit."
STATIC = {"axis_name": "Pass a name, or a tuple of names."}


def instead(parameters: Collection[str], option: str) -> str:
    """The hint for an option that isn't among the parameters of a function. Empty if there is no hint."""
    of_tokens = "hidden" in parameters or "chunk_size" in parameters
    hints = (TOKENS if of_tokens else ROWS if "where" in parameters else ELEMENTWISE).get(option, ())
    # A hint must not name another argument that this function lacks: it would only lead to the next error.
    absent = [name for name in ("labels", "weights") if name not in parameters]
    return next((hint for hint in hints if not any(name in hint for name in absent)), "")


def public(*static: str, numbers: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A decorator: `jax.jit` with these arguments static, and errors for arguments that the function doesn't take.

    `numbers` are static if they are Python numbers. If they are arrays or traced, they are traced like other arguments.
    """

    def jitted(function):
        name, parameters = function.__name__, inspect.signature(function).parameters

        @functools.wraps(function)
        def results(*args, **options):
            return jax.tree.map(_result, function(*args, **options))

        @functools.cache
        def program(*traced: str):
            return jax.jit(results, static_argnames=[n for n in static + numbers if n not in traced])

        # A plain function around the jitted function. `jax.grad` and others apply `functools.wraps`, which would copy
        # the `lower` of a jitted function f. Then jax.grad(f).lower would lower f instead of its gradient.
        @functools.wraps(function)
        def called(*args, **options):
            # Objects that JAX takes as arrays, such as parameters of Flax, become arrays here. As a static argument,
            # such an object would make its value part of the program, and each value would compile another program.
            options = {key: as_number(name, key, x) if key in numbers else x for key, x in options.items()}
            _require_own(name, parameters, len(args), options, static, numbers)
            for key, x in (*zip(parameters, args, strict=False), *options.items()):
                if isinstance(x, str) and key not in (*static, *numbers):
                    as_array(name, key, x)  # raises an error. Under jit, JAX would raise a less helpful one.
            if any(_has_function(x) for x in (*args, *(x for key, x in options.items() if key not in static))):
                return results(*args, **options)  # under jit, each call would compile a program that is never reused
            args, options = unfolded((args, options))
            return program(*(key for key in numbers if is_array(options.get(key))))(*args, **options)

        return cast(F, called)

    return jitted


LARGE = 2**16  # XLA takes some milliseconds to fold a constant softmax of this size on a CPU


def unfolded(arguments: T) -> T:
    """A pytree of arguments, with a barrier for each large array that is a constant of the program."""
    # Until JAX no longer has XLA fold such constants, which takes 10 to 140 s for a teacher's logits [64, 32768].
    leaves, tree = jax.tree.flatten(arguments)
    if not any(map(_is_large_constant, leaves)) or not in_a_program():
        return arguments
    return tree.unflatten(
        [jax.lax.optimization_barrier(jnp.asarray(x)) if _is_large_constant(x) else x for x in leaves]
    )


def _is_large_constant(x) -> bool:
    return is_array(x) and not isinstance(x, jax.core.Tracer) and x.size >= LARGE


def _has_function(x) -> bool:
    """Whether x is a function (as head), or a `Linear` whose head is a function."""
    return not is_array(x) and (is_function(x) or getattr(x, "of_function", False))


def _require_own(name, parameters, count: int, options: Mapping[str, Any], static, numbers) -> None:
    """Raises an error unless the function takes `count` positional arguments and these options by keyword."""
    kinds = [p.kind for p in parameters.values()]
    positional = kinds.count(Kind.POSITIONAL_OR_KEYWORD)
    if Kind.VAR_POSITIONAL not in kinds and count > positional:
        by_keyword = ", ".join(f"{key}=" for key in [*parameters][positional:])
        raise TypeError(
            f"{name}: positional arguments are {', '.join([*parameters][:positional])}"
            f"{f', and keyword arguments {by_keyword}' if by_keyword else ''}; got {count} positional arguments."
        )
    for option, value in options.items():
        if option not in parameters:
            raise TypeError(
                f"{name}: no argument {option!r}; it takes {', '.join(parameters)}.{instead(parameters, option)}"
            )
        if option in numbers and not is_array(value) and not _is_hashable(value):
            raise ValueError(
                f"{name}: {option} must be a number or a real array; got {option}: {type(value).__name__}."
                f" Pass a value that jnp.asarray accepts."
            )
        if option in static and not _is_hashable(value):
            raise ValueError(
                f"{name}: {option} must be static and hashable, since it is compiled in; got {option}:"
                f" {type(value).__name__}. {STATIC.get(option, A_VALUE)}"
            )
        if option not in numbers and isinstance(parameters[option].default, bool):
            require_bool(name, **{option: value})


# The identity, as a primitive at which checkify looks for a NaN in a public result.
# Until JAX no longer raises a ValueError for the gradient of a function that checkify has transformed, if a check is
# inside custom_jvp under jax.jit or jax.checkpoint (0.8 to 0.12): check public results instead of kernels.


def _result(x: Array) -> Array:
    return _result_p.bind(x)


_result_p = primitive("result", lambda x: x, (lambda t, x: t,), (lambda ct, x: ct,), types=lambda x: x)


def _is_hashable(value) -> bool:
    """Whether the value is hashable, with everything that it contains: a tuple of lists isn't."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
