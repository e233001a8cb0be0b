"""How a public function is called: under `jax.jit`, with the errors of a call that isn't one of its own."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

import jax
from jax import Array

from jce._arguments import as_number, is_array, require_bool
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
    """`jax.jit` with these arguments static, keeping the signature that editors and type checkers see.

    The numbers are static where they are Python's, and arguments like any other where they are traced, or arrays.
    """
    return lambda function: cast(F, Public(function, static, numbers))


class Public:
    """A jitted function, which says by name what it doesn't take.

    A class for the sake of `lower`. In a function's `__dict__` it would be handed on by `functools.wraps`, of which
    `jax.grad` and its like make theirs: to lower the gradient would lower the function. What a type has stays here, as
    does what is in slots.
    """

    __slots__ = ("__dict__", "__weakref__", "_jitted", "_numbers", "_parameters", "_positional", "_static")
    __name__: str
    __qualname__: str

    def __init__(self, function: Callable, static: tuple[str, ...], numbers: tuple[str, ...]):
        functools.update_wrapper(self, function)

        @functools.wraps(function)
        def results(*args, **options):
            return jax.tree.map(_result, function(*args, **options))

        @functools.cache
        def jitted(*traced: str):
            names = [name for name in static + numbers if name not in traced]
            return jax.jit(results, static_argnames=names)

        self._jitted, self._static, self._numbers = jitted, static, numbers
        self._parameters = parameters = inspect.signature(function).parameters
        kinds = [p.kind for p in parameters.values()]
        self._positional = None if Kind.VAR_POSITIONAL in kinds else kinds.count(Kind.POSITIONAL_OR_KEYWORD)

    def __call__(self, *args, **options):
        options = self._of_arrays(options)
        return self._program(args, options)(*args, **options)

    def lower(self, *args, **options):
        """As `jax.jit` has it: the program, to be compiled ahead of time, for arrays or `jax.ShapeDtypeStruct`s."""
        options = self._of_arrays(options)
        return self._program(args, options).lower(*args, **options)

    @property
    def __class__(self):  # pyright: ignore[reportIncompatibleMethodOverride]  # what help() and documentation ask for
        return types.FunctionType

    def __getattr__(self, name):  # and what they read of a function: its code, defaults, annotations
        if name == "__wrapped__":
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __get__(self, instance, owner=None):  # as an attribute of a class it is a method, as a function would be
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self):  # pickled and copied by name
        return self.__qualname__

    def __repr__(self):
        return f"<function {self.__module__}.{self.__qualname__}>"

    def _of_arrays(self, options: dict[str, Any]) -> dict[str, Any]:
        """With arrays for numbers that are some but in their type, and else would be part of the program."""
        return {
            name: as_number(self.__name__, name, value) if name in self._numbers else value
            for name, value in options.items()
        }

    def _program(self, args: tuple, options: Mapping[str, Any]):
        if self._positional is not None and len(args) > self._positional:
            names = list(self._parameters)
            by_keyword = ", ".join(f"{name}=" for name in names[self._positional :])
            raise TypeError(
                f"{self.__name__}: by position it takes {', '.join(names[: self._positional])}"
                f"{f', and by keyword {by_keyword}' if by_keyword else ''}; got {len(args)} arguments by position."
            )
        traced = []
        for option, value in options.items():
            if option in self._numbers:
                traced += [option] if is_array(value) else []
                if not is_array(value) and not _is_hashable(value):
                    raise ValueError(
                        f"{self.__name__}: {option} must be a number, or a real array of one; got {option}:"
                        f" {type(value).__name__}. Pass what jnp.asarray takes."
                    )
            elif option not in self._parameters:
                raise TypeError(
                    f"{self.__name__}: no argument {option!r}; it takes {', '.join(self._parameters)}."
                    f"{instead(self._parameters, option)}"
                )
            elif option in self._static and not _is_hashable(value):
                raise ValueError(
                    f"{self.__name__}: {option} must be static and hashable, since the program depends on it; got"
                    f" {option}: {type(value).__name__}. {STATIC.get(option, A_NUMBER)}"
                )
            elif isinstance(self._parameters[option].default, bool):
                require_bool(self.__name__, **{option: value})
        return self._jitted(*traced)


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
