"""Canonicalizes the arguments of every public function: dtype, shape, axis, `where`, and the texts of errors.

Arguments that only functions of a head take are handled in `_heads`. All checks are of static facts, so they cost
nothing at run time, and errors are raised while tracing.

Under `jax.jit` an argument need not be an array in memory: XLA fuses the operations that make it into each pass that
reads it, and recomputes it there, each time rounded a little differently. For example it contracts a product x·t with a
difference behind it to one fused multiply-add, and has two implementations of tanh. So two reads of one entry may be
some ulps apart, and no kernel may depend on their being equal: not by ==, a floor, a difference of 0 or the rounding
error of a sum. Comparisons need a margin, or must be such that either answer is right. tests/test_in_program.py tests
this.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jce._jax.classes import Classes, varying
from jce._jax.layout import Layout, manual_axes, mesh_names, split_batch_axes


def elementwise(function: str, **arguments: ArrayLike) -> list[Array]:
    """The arguments as floating-point arrays of one dtype and shape."""
    arrays = _as_floats(function, arguments)
    layout = Layout.of(_broadcast_shape(function, "the shapes", arguments, arrays), arrays)
    return [layout.place(x) for x in arrays]


def distributions(
    function: str,
    axis: int,
    where: ArrayLike | None,
    axis_name: Hashable | None = None,
    *,
    in_logits: Collection[str] = (),
    **arguments: ArrayLike,
) -> tuple[list[Array], Classes]:
    """The arguments as floating-point arrays of one dtype and shape, and where their classes are.

    Excluded classes have probability 0: a logit of -∞ in the arguments named by `in_logits`, and 0 in the others. A row
    of logits with no class left becomes certainty in the first class, for which every function is 0.
    """
    arrays, given = _as_floats(function, arguments), axis
    axis = _class_axis(function, axis, arguments, arrays)
    if len({x.shape[axis] for x in arrays}) > 1:
        raise ValueError(
            f"{function}: {_and(arguments)} must have the same number of classes along axis={given}, which is never"
            f" broadcast; got {described(arguments)}. Say which axis holds the classes with axis=, or pad:"
            f" probabilities with 0, logits with -inf."
        )
    shape = _broadcast_shape(function, "the batch axes", arguments, arrays)
    classes = Classes(axis, mesh_axis(function, axis_name, arrays))
    masks = [] if where is None else [_mask(function, where, shape, axis, arguments)]
    layout = Layout.of(shape, arrays + masks)
    arrays, masks = ([layout.place(x) for x in xs] for xs in (arrays, masks))
    if shape[axis] == 0:  # treated as a single class, on each device, that is excluded
        arrays = [jnp.zeros(jnp.expand_dims(x.sum(axis), axis).shape, x.dtype) for x in arrays]
        masks = [jnp.zeros(arrays[0].shape, bool)]
    for mask in masks:
        # The select stands outside every rule, so an excluded entry's derivative is exactly 0, whatever it holds.
        arrays = [
            jnp.where(mask, x, _impossible(mask, classes, x.dtype) if name in in_logits else jnp.zeros_like(x))
            for name, x in zip(arguments, arrays, strict=True)
        ]
    return arrays, classes


def mesh_axis(function: str, axis_name: Hashable | None, arrays: Iterable[Array]) -> Hashable | None:
    """`axis_name`, checked to name axes of a `jax.shard_map` around. With that of a `jax.vmap`, a gradient inside would
    be too large by a factor of the batch's size.
    """
    # Until JAX no longer fails its type checks under spmd_axis_name: batched arrays vary over that mesh axis and others
    # don't, while it batches one operation after another. So an error of ours comes first.
    names = mesh_names(axis_name)
    if not all(isinstance(name, Hashable) and name in manual_axes() for name in names):
        raise ValueError(
            f"{function}: axis_name must name an axis of the mesh of a jax.shard_map around the call, over which"
            f" the classes are split; got axis_name={axis_name!r}. Leave it out where the classes are whole."
        )
    batch_axes = sorted(split_batch_axes(), key=str)
    if names and batch_axes and any(map(varying, arrays)):
        raise ValueError(
            f"{function}: inside a jax.vmap with spmd_axis_name, axis_name must be of a jax.shard_map that has"
            f" check_vma=False; got axis_name={axis_name!r}, and spmd_axis_name of {batch_axes}."
            f" Pass check_vma=False to the jax.shard_map and differentiate outside of it, or leave out spmd_axis_name."
        )
    return axis_name


def _impossible(mask: Array, classes: Classes, dtype) -> Array:
    """Logits for excluded classes: -∞, but 0 for the first class of a row where all are excluded."""
    first = classes.is_at(mask, classes.local(jnp.zeros(_without(mask.shape, classes.axis), jnp.int32), mask))
    nothing = ~classes.column(classes.any(mask))
    return jnp.where(first & nothing, jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[: len(shape) + axis] + shape[len(shape) + axis + 1 :]


def labelled(
    function: str,
    axis: int,
    where: ArrayLike | None,
    axis_name: Hashable | None,
    labels: ArrayLike,
    logits: ArrayLike,
    several: str = "label_probs",
) -> tuple[Array, Array, Array, Classes]:
    """Labels of the batch's shape, logits as in `distributions`, an array of 1 for each class kept, and the classes."""
    got = {"labels": labels, "logits": logits}
    y = _integer_labels(function, got)
    x, kept, classes, rows = _logits_of_labels(function, axis, where, axis_name, logits)
    if y.shape != rows.shape:
        raise ValueError(
            f"{function}: labels must have the shape of logits without the class axis, {rows.shape}; got"
            f" {described(got)}. The target comes first, the model second; for one label against a batch of logits use"
            f" jax.vmap, for several of each distribution {several}."
        )
    y = rows.place(y)
    if where is not None or jnp.asarray(logits).shape[classes.axis] == 0:
        # In a row with no class left any label is allowed, also one that is no class.
        y = jnp.where(classes.any(kept != 0), y, jnp.zeros_like(y))
    return y, x, kept, classes


def labelled_with_probs(
    function: str,
    axis: int,
    where: ArrayLike | None,
    axis_name: Hashable | None,
    labels: ArrayLike,
    label_probs: ArrayLike,
    logits: ArrayLike,
) -> tuple[Array, Array, Array, Array, Classes]:
    """Labels and their probabilities, [..., k]; and logits, classes kept and classes as in `labelled`, with the class
    axis last."""
    got = {"labels": labels, "label_probs": label_probs, "logits": logits}
    y = _integer_labels(function, got)
    p, x = _as_floats(function, {name: got[name] for name in ("label_probs", "logits")})
    x, kept, classes, rows = _logits_of_labels(function, axis, where, axis_name, x)
    if y.ndim == 0 or y.shape[:-1] != rows.shape or p.shape != y.shape:
        raise ValueError(
            f"{function}: labels and label_probs must both have the shape of logits without the class axis, and an axis"
            f" for the labels of each distribution last, {rows.shape} and k; got {described(got)}."
        )
    few = Layout(y.shape, rows.mesh, (*rows.spec, None))
    y, p = few.place(y), few.place(p)
    if where is not None or jnp.asarray(logits).shape[classes.axis] == 0:
        p = jnp.where(jnp.expand_dims(classes.any(kept != 0), -1), p, jnp.zeros_like(p))
    x, kept = (jnp.moveaxis(a, classes.axis, -1) for a in (x, kept))
    return y, p, x, kept, Classes(-1, classes.mesh_axis)


def labelled_several(
    function: str, axis: int, where: ArrayLike | None, axis_name: Hashable | None, labels: ArrayLike, logits: ArrayLike
) -> tuple[Array, Array, Array | None, Classes]:
    """Labels, [..., k]; logits with the class axis last; which rows have a class left, or None if all have; and the
    classes."""
    got = {"labels": labels, "logits": logits}
    y = _integer_labels(function, got)
    x, kept, classes, rows = _logits_of_labels(function, axis, where, axis_name, logits)
    if y.ndim == 0 or y.shape[:-1] != rows.shape:
        raise ValueError(
            f"{function}: labels must have the shape of logits without the class axis, {rows.shape}, or that and an"
            f" axis for k labels of each distribution last, as they must with a tail; got {described(got)}. One label"
            f" is k = 1: labels[..., None]."
        )
    y = Layout(y.shape, rows.mesh, (*rows.spec, None)).place(y)
    all_kept = where is None and jnp.asarray(logits).shape[classes.axis] > 0
    some = None if all_kept else jnp.expand_dims(classes.any(kept != 0), -1)
    return y, jnp.moveaxis(x, classes.axis, -1), some, Classes(-1, classes.mesh_axis)


def _integer_labels(function: str, got: Mapping[str, ArrayLike]) -> Array:
    y = as_array(function, "labels", got["labels"])
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must be integers, a class index for each distribution; got {described(got)}. The"
            f" target comes first, the model second; for probabilities as targets there is cross_entropy_with_logits."
        )
    return wide_enough(y)


def _logits_of_labels(function, axis, where, axis_name, logits) -> tuple[Array, Array, Classes, Layout]:
    """Logits as in `distributions`, an array of 1 for each class kept, the classes, and the layout of rows."""
    (x,), classes = distributions(function, axis, where, axis_name, in_logits=("logits",), logits=logits)
    logits, mask = jnp.asarray(logits), jnp.asarray(True if where is None else where)
    layout = Layout.of(logits.shape, [logits, mask])  # as in `distributions`
    kept = layout.place(mask).astype(x.dtype) if logits.shape[classes.axis] else jnp.zeros_like(x)
    return x, kept, classes, layout.without(classes.axis)


def require_no_tail(function: str, tail: bool) -> None:
    if tail:
        raise ValueError(
            f"{function}: tail must come with label_probs, the probabilities of labels; got tail={tail!r} alone. A"
            f" single label leaves nothing for a tail."
        )


def wide_enough(labels: Array) -> Array:
    """The labels, as int32 if their dtype has one or two bytes, which might not hold the number of classes."""
    return labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)


SHARE = "Pass the share of the target's weight that is spread over all classes, such as 0.1."


def fraction(function: str, dtype, *, ends: bool = True, advice: str = SHARE, **option: Any) -> float | Array:
    """A traced number, or a Python number from 0 to 1; without `ends`, above 0 and below 1 as the dtype rounds it."""
    ((name, value),) = option.items()
    if is_array(value):
        return _traced(function, dtype, name, value)
    if is_number(value) and 0 <= value <= 1 and (ends or np.finfo(dtype).tiny <= np.asarray(value, dtype) < 1):
        return float(value)
    range_ = "from 0 to 1" if ends else f"above 0 and below 1 in {np.dtype(dtype)}"
    raise ValueError(f"{function}: {name} must be a number {range_}; got {name}={value!r}. {advice}")


def positive(function: str, dtype, *, or_zero: bool = False, **option: Any) -> float | Array:
    """A traced number, or a Python number above 0 (or 0, with `or_zero`) in the normal range of float32."""
    ((name, value),) = option.items()
    if is_array(value):
        return _traced(function, dtype, name, value)
    least, most = map(float, (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    if not is_number(value) or not (least <= value <= most or (or_zero and value == 0)):
        raise ValueError(
            f"{function}: {name} must be a number from {least:.2g} to {most:.2g}{' or 0' if or_zero else ''};"
            f" got {name}={value!r}. Leave it out for none."
        )
    return float(value)


def is_array(value) -> TypeGuard[Array]:
    """Whether a number is traced or in an array: then its value isn't checked, and no branch depends on it."""
    return isinstance(value, Array | np.ndarray)


def is_function(head: Any) -> bool:
    """Whether a head is to be called. What `jnp.asarray` takes is a matrix, even if it's callable, as in Flax."""
    if not callable(head):
        return False
    return not hasattr(head, "__jax_array__") and not (hasattr(head, "shape") and hasattr(head, "dtype"))


def _traced(function: str, dtype, name: str, value: Array) -> Array:
    """The array of shape () in this dtype: like a Python number, it widens no other array."""
    if value.ndim or value.dtype == bool or not is_real(value):
        raise ValueError(
            f"{function}: {name} must be a real number, or a real array of shape (); got {described({name: value})}."
            f" For several at once use jax.vmap."
        )
    _require_wide(function, {name: value})
    return jnp.asarray(value, dtype)


def as_number(function: str, name: str, value: Any) -> Any:
    """An array for a list of numbers and for what JAX takes as an array, such as a parameter of flax; others as is."""
    is_one = isinstance(value, list | tuple) or (hasattr(value, "__jax_array__") and not is_array(value))
    return as_array(function, name, value) if is_one else value


def integer(value: Any) -> int | None:
    """The int of a static integer of Python or NumPy; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def require_bool(function: str, **option: Any) -> None:
    """Raises unless the option is True or False: not an array, nor a 0, 1 or string that Python would accept."""
    ((name, value),) = option.items()
    if not isinstance(value, bool):
        raise ValueError(f"{function}: {name} must be a static bool; got {name}={value!r}. Pass True or False.")


def choice(function: str, *, choices: tuple[str, ...], **option: str) -> str:
    """The option's value, checked to be one of the choices."""
    ((name, value),) = option.items()
    if not isinstance(value, str) or value not in choices:
        words = " or ".join(f'"{word}"' for word in choices)
        raise ValueError(f"{function}: {name} must be {words}; got {name}={value!r}.")
    return value


def is_number(value) -> TypeGuard[float]:
    """Whether value is a real number of Python or NumPy, and no bool."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _broadcast_shape(function: str, what: str, arguments: Mapping[str, ArrayLike], arrays: list[Array]):
    try:
        return jnp.broadcast_shapes(*(x.shape for x in arrays))
    except ValueError:
        raise ValueError(
            f"{function}: {what} of {_and(arguments)} must broadcast; got {described(arguments)}."
            f" Add axes of length 1 where they differ, or use jax.vmap."
        ) from None


def _as_floats(function: str, arguments: Mapping[str, ArrayLike]) -> list[Array]:
    """Arrays of the widest floating dtype among the arguments, at least float32. A Python scalar never widens."""
    dtype = float_dtype(function, arguments)
    return [as_array(function, name, x).astype(dtype) for name, x in arguments.items()]


def float_dtype(function: str, arguments: Mapping[str, ArrayLike]):
    """float64 if one of the arguments is, else float32."""
    arrays = [as_array(function, name, x) for name, x in arguments.items()]
    if not all(map(is_real, arrays)):
        raise TypeError(
            f"{function}: {_and(arguments)} must be real (floating-point, integer or bool);"
            f" got {described(arguments)}. Convert to real numbers first."
        )
    _require_wide(function, arguments)
    strong = [x.dtype for x in arrays if not x.weak_type]
    double = jnp.float64 in (strong or [jnp.result_type(float)])
    return jnp.float64 if double else jnp.float32


def _require_wide(function: str, arguments: Mapping[str, ArrayLike]) -> None:
    """Raises for floats of 8 bits or fewer: values would be right, but gradients, which come back in the argument's
    dtype, would mostly be rounded to 0. Integers have no gradient, so their width doesn't matter.
    """
    dtypes = {name: as_array(function, name, x).dtype for name, x in arguments.items()}
    narrow = [name for name, t in dtypes.items() if jnp.issubdtype(t, jnp.floating) and t.itemsize < 2]
    if narrow:
        raise TypeError(
            f"{function}: {_and(narrow)} must have at least 16 bits where floating-point, since a gradient comes back"
            f" in its argument's dtype, and would be rounded to 0 in fewer; got {described(arguments)}. Upcast first,"
            f" and differentiate in what that gives, as by {narrow[0]}.astype(jnp.bfloat16)."
        )


def is_real(x) -> bool:
    """Whether x is floating-point, integer or bool."""
    return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool


def as_array(function: str, name: str, x: Any) -> Array:
    try:
        if x is None:
            raise TypeError
        # Under an eager gradient asarray is an operation: jax_debug_nans would stop at a NaN that `where` leaves out.
        return x if isinstance(x, Array) else jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: {name} must be an array, a number or a rectangular nest of numbers;"
            f" got {name}: {type(x).__name__}. Pass what jnp.asarray takes."
        ) from None


def _class_axis(function: str, axis: int, arguments: Mapping[str, ArrayLike], arrays: list[Array]) -> int:
    """`axis` of the broadcast arguments as a negative int, which means the same for arrays of different rank."""
    if min(x.ndim for x in arrays) == 0:
        raise ValueError(
            f"{function}: {_and(arguments)} must have a class axis; got {described(arguments)}."
            f" Pass the probabilities of all classes; for one number alpha that stands for {{alpha, 1 - alpha}} there"
            f" are the binary functions."
        )
    ndim = max(x.ndim for x in arrays)
    given, at = axis, integer(axis)
    if at is None:
        raise ValueError(
            f"{function}: axis must be one int; got axis={axis!r}. Name the axis that holds the classes; of several,"
            f" make one with reshape first."
        )
    if not -ndim <= at < ndim:
        raise ValueError(
            f"{function}: axis must be from {-ndim} to {ndim - 1}; got axis={at} with {described(arguments)}."
            f" Name the axis that holds the classes."
        )
    axis = at - ndim if at >= 0 else at
    if min(x.ndim for x in arrays) < -axis:
        raise ValueError(
            f"{function}: {_and(arguments)} must each have the class axis, which is never broadcast; got axis={given}"
            f" of the broadcast shape with {described(arguments)}. Add the missing axis, or use jax.vmap."
        )
    return axis


def _mask(
    function: str, where: ArrayLike, shape: tuple[int, ...], axis: int, arguments: Mapping[str, ArrayLike]
) -> Array:
    got = {"where": where, **arguments}
    mask = as_array(function, "where", where)
    require_boolean(function, mask, got)
    if not broadcasts_to(shape, mask.shape):
        raise ValueError(
            f"{function}: where must broadcast to the shape {shape} of {_and(arguments)}; got {described(got)}."
            f" To drop whole distributions, give it a class axis of length 1: where="
            f"{'mask[..., None]' if axis == -1 else f'jnp.expand_dims(mask, {axis})'}."
        )
    return mask


def require_boolean(function: str, where: Array, got: Mapping[str, ArrayLike]) -> None:
    if where.dtype != bool:
        raise TypeError(f"{function}: where must be boolean; got {described(got)}. Compare it first: where=mask != 0.")


def broadcasts_to(shape: tuple[int, ...], given: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, given) == shape
    except ValueError:
        return False


def _and(arguments: Iterable[str]) -> str:
    return " and ".join(arguments)


def described(arguments: Mapping[str, ArrayLike | jax.ShapeDtypeStruct]) -> str:
    types = {name: jax.eval_shape(jnp.asarray, x) for name, x in arguments.items()}
    return ", ".join(f"{name}: {x.dtype}[{','.join(map(str, x.shape))}]" for name, x in types.items())
