"""How a public function is called: under `jax.jit`, with the errors of a call that isn't one of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

import jax
from jax import Array

from jce._arguments import as_number, is_array, require_bool
from jce._heads.called import Called, is_function
from jce._heads.linear import Linear
from jce._primitives import primitive

F = TypeVar("F", bound=Callable[..., Any])
Kind = inspect.Parameter

# What to write for what others call so: in functions of rows of classes, in elementwise ones, and in those of tokens
OF_EACH = {
    "weights": " Multiply the result, which has a number for each, by them.",
    "reduction": " The result has a number for each: take its .mean() or .sum().",
}
ROWS = OF_EACH | {
    "mask": " Write where=mask[..., None] for a mask of rows, and where=mask for one of classes.",
    "weight": " Multiply the result, which has a number for each, by weight[labels].",
    "ignore_index": " Leave rows out with where=(labels != index)[..., None].",
}
ELEMENTWISE = OF_EACH | {
    "mask": " Write jnp.where(mask, result, 0).",
    "where": " Write jnp.where(where, result, 0).",
}
TOKENS = OF_EACH | {
    "mask": " Leave tokens out with where=mask.",
    "weight": " Write weights=weight[labels].",
    "ignore_index": " Leave tokens out with where=labels != index.",
}


# What to pass where what was passed can't be part of a program
A_NUMBER = "Pass a Python value; of an array its number, by float(x) or int(x) outside jax.jit."
STATIC: dict[str, str] = dict.fromkeys(("axis_name", "token_axis", "class_axis"), "Pass a name, or a tuple of names.")


def instead(parameters: Collection[str], option: str) -> str:
    """What to write, in a function of these parameters, for an option that isn't one of them."""
    of_tokens = "hidden" in parameters or "chunk_size" in parameters
    hint = (TOKENS if of_tokens else ROWS if "where" in parameters else ELEMENTWISE).get(option, "")
    # Not what takes an argument that the function doesn't have either
    return "" if any(name in hint and name not in parameters for name in ("labels", "weights")) else hint


def public(*static: str, numbers: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A function under `jax.jit` with these arguments static, which says by name what it doesn't take.

    The numbers are static where they are Python's, and arguments like any other where they are traced, or arrays.
    """

    def jitted(function):
        name, parameters = function.__name__, inspect.signature(function).parameters

        @functools.wraps(function)
        def results(*args, **options):
            return jax.tree.map(_result, function(*args, **options))

        @functools.cache
        def program(*traced: str):
            return jax.jit(results, static_argnames=[n for n in static + numbers if n not in traced])

        # Not the jitted function itself: `functools.wraps`, by which `jax.grad` and its like make theirs, would hand on
        # its `lower`, and to lower the gradient would lower the function.
        @functools.wraps(function)
        def called(*args, **options):
            # Numbers that are some but in their type would be part of the program.
            options = {key: as_number(name, key, x) if key in numbers else x for key, x in options.items()}
            _require_own(name, parameters, len(args), options, static, numbers)
            if any(_has_function(x) for x in (*args, *(x for key, x in options.items() if key not in static))):
                return results(*args, **options)  # a program of its own each time, which nothing would find again
            return program(*(key for key in numbers if is_array(options.get(key))))(*args, **options)

        return cast(F, called)

    return jitted


def _has_function(x) -> bool:
    """Whether it is a head that is a function, or a `Linear` of one."""
    return is_function(x) or (isinstance(x, Linear) and isinstance(x.head, Called))


def _require_own(name, parameters, count: int, options: Mapping[str, Any], static, numbers) -> None:
    """That so many arguments by position, and these by name, are the function's."""
    kinds = [p.kind for p in parameters.values()]
    positional = kinds.count(Kind.POSITIONAL_OR_KEYWORD)
    if Kind.VAR_POSITIONAL not in kinds and count > positional:
        by_keyword = ", ".join(f"{key}=" for key in [*parameters][positional:])
        raise TypeError(
            f"{name}: by position it takes {', '.join([*parameters][:positional])}"
            f"{f', and by keyword {by_keyword}' if by_keyword else ''}; got {count} arguments by position."
        )
    for option, value in options.items():
        if option not in parameters:
            raise TypeError(
                f"{name}: no argument {option!r}; it takes {', '.join(parameters)}.{instead(parameters, option)}"
            )
        if option in numbers and not is_array(value) and not _is_hashable(value):
            raise ValueError(
                f"{name}: {option} must be a number, or a real array of one; got {option}: {type(value).__name__}."
                f" Pass what jnp.asarray takes."
            )
        if option in static and not _is_hashable(value):
            raise ValueError(
                f"{name}: {option} must be static and hashable, since the program depends on it; got {option}:"
                f" {type(value).__name__}. {STATIC.get(option, A_NUMBER)}"
            )
        if option not in numbers and isinstance(parameters[option].default, bool):
            require_bool(name, **{option: value})


# As it is, but where checkify looks for a NaN. In kernels it may not: of a check that is made in a custom_jvp function
# under jax.jit or jax.checkpoint, what checkify makes has no gradient (a ValueError of JAX's own, 0.8 to 0.12).


def _result(x: Array) -> Array:
    return _result_p.bind(x)


_result_p = primitive("result", lambda x: x, (lambda t, x: t,), (lambda ct, x: ct,), types=lambda x: x)


def _is_hashable(value) -> bool:
    """To the last of what it holds: a tuple of lists isn't."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
