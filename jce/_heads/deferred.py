"""A head that isn't run where a model calls it: a `Linear` of its states and itself goes on in place of logits."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jce._heads.called import Called
from jce._heads.linear import Linear

try:  # Until JAX no longer hides whether a vmap maps an array (0.8 to 0.12): a private import.
    from jax._src.interpreters.batching import BatchTracer
except ImportError:  # then a head comes out of one mapped, which `checked_linear` refuses
    BatchTracer = ()

ABSENT = object()
_lock = threading.Lock()
# For each class and name: what the class itself had there, or ABSENT, and how many contexts replace it now.
_replaced: dict[tuple[Any, str], tuple[Any, int]] = {}
_deferred: contextvars.ContextVar[tuple[tuple[Any, str], ...]] = contextvars.ContextVar("deferred", default=())


@contextlib.contextmanager
def deferred(module: Any, method: str = "__call__") -> Iterator[None]:
    """Within it a call of this module, a model's head, isn't run, but gives a `Linear`: so the model gives one as well.

    Example:
      >>> class Head:
      ...     def __call__(self, h):
      ...         return 20 * h @ jnp.eye(2, 3)
      >>> head = Head()
      >>> with jce.deferred(head):
      ...     x = head(jnp.eye(2))
      >>> print(x, jce.linear_map(jnp.argmax, x))
      Linear(hidden=float32[2, 2], head=a function that gives float32[3], bias=None, logit_soft_cap=None) [0 1]

        def loss(model, tokens, labels, where):
            with jce.deferred(model.lm_head):  # of a tied head, jce.deferred(model.embedder, "decode")
                x = model(tokens)
            return jce.linear_cross_entropy(labels, x, where=where)

    No model has to change, unless it computes with its logits: that raises a TypeError. Only functions of trees, such
    as `jax.tree.map` and `jax.lax.psum`, compute with x's states and arrays, silently: leave them out. Tokens may be
    picked from x, as in x[:, :-1], and `jnp.astype(x, jnp.float32)`, or `x.astype`, is x itself, since its logits are
    float32. A soft cap that follows is to be switched off in the model and given to jce: `dataclasses.replace(x,
    logit_soft_cap=30.0)`.

    The head is traced where the model calls it, as `Linear` says of functions, so in the scope that the model calls it
    in: a precision, a mesh, or Qwix's, which quantizes and adds a low-rank update there alone. Outside of it, as by
    `jce.linear_cross_entropy(labels, hidden, model.lm_head)`, Qwix leaves both out, and nothing tells. Called in it, by
    the model itself, jce's functions take a function as the head, and refuse a matrix, whose product Qwix doesn't see.

    This very module is meant, `self is module`; others of its class run as ever. A copy is another one: where
    `nnx.jit`, `eqx.filter_jit` or a vmap gets the model as an argument, enter inside. Enter inside of `jax.jit` in any
    case, and of `jax.checkpoint`, since what they traced before isn't traced again. A module of Flax NNX is traced as a
    copy: an attribute that it sets in the call is lost, and Flax refuses to let it write to its variables. A module of
    Flax Linen is bound anew in each apply: let Linen intercept its call.

        def deferring(call, args, kwargs, context):
            if context.module.path != ("lm_head",):
                return call(*args, **kwargs)
            module, variables = context.module.unbind()
            return jce.Linear(*args, lambda h: module.apply(variables, h))

        with flax.linen.intercept_methods(deferring):
            x = model.apply(params, tokens)

    Under `jax.vmap`, of a model or in it, as of Equinox' heads of one state, the states are mapped, and x closes over
    the head's arrays: they are differentiated, but are no leaves of x. So `jax.lax.stop_gradient(x)` doesn't stop them,
    and x can't leave a `jax.checkpoint`, a scan or a jit: take the loss inside. Where a vmap maps the head too, map the
    loss.

    Args:
      module: the head, or what has it as a method: an object whose class has the method, as of Flax NNX or Equinox.
      method: the method's name. Its first argument by position is the states, real, [..., d]; it gives floating-point
        logits [..., n]. All others are handed on.

    Returns:
      A context manager, which gives None. Meanwhile the class' method and `jnp.astype` are replaced; on leaving, also
      by an error, they are back. Contexts may be nested, and left in any order. Calls of other threads run as ever,
      whichever leaves first.

    Raises:
      TypeError: the class of module has no such method, or module is one of Flax Linen; in the call, if the first
        argument isn't an array, or not real.
      ValueError: in the call, if what is deferred doesn't give logits, draws random numbers or has an effect.
    """
    owner = type(module)
    # A class without a __call__ of its own gives its metaclass' one.
    if not (any(method in vars(c) for c in owner.__mro__) and callable(getattr(owner, method))):
        raise TypeError(
            f"deferred: module must be an object whose class has the method {method!r}; got module: {owner.__name__}."
            f" Pass the module that the model calls as its head, or of a tied head its module and the method's name."
        )
    if hasattr(owner, "unbind"):
        raise TypeError(
            f"deferred: a module of Flax Linen is bound anew in each apply, so that the one that is called is another;"
            f" got module: {owner.__name__}. Use flax.linen.intercept_methods, as help(jce.deferred) says."
        )
    entry = (module, method)
    _deferred.set((*_deferred.get(), entry))
    try:
        with _replacing(owner, method, functools.partial(_deferring, method)), _replacing(jnp, "astype", _astype):
            yield
    finally:
        # Not reset to what it was before: contexts, as those of generators, may be left in any order.
        _deferred.set(tuple(x for x in _deferred.get() if x is not entry))


@contextlib.contextmanager
def _replacing(owner: Any, name: str, replacement: Callable) -> Iterator[None]:
    """Replaces an attribute until the last of the contexts that replace it is left, in whichever order."""
    with _lock:
        own, count = _replaced.get((owner, name), (vars(owner).get(name, ABSENT), 0))
        if not count:
            try:
                setattr(owner, name, replacement(getattr(owner, name)))
            except (AttributeError, TypeError) as error:
                raise TypeError(
                    f"deferred: the class of module must let its {name!r} be replaced; got module: {owner.__name__}. Of"
                    f" a function let the model give jce.Linear(hidden, function)."
                ) from error
        _replaced[owner, name] = own, count + 1
    try:
        yield
    finally:
        with _lock:
            own, count = _replaced.pop((owner, name))
            if count > 1:
                _replaced[owner, name] = own, count - 1
            elif own is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _deferring(method: str, original: Callable) -> Callable:
    @functools.wraps(original)
    def called(self, *args, **options):
        if not any(self is module and method == name for module, name in _deferred.get()):
            return original(self, *args, **options)
        hidden: Any = args[0] if args else None
        alike, name = _alike(self), f"{type(self).__name__}.{method}"
        # While it is traced nothing is deferred: it may call another head, or itself.
        before = _deferred.set(())
        try:
            head = Called.of("deferred", name, lambda h: original(alike(), h, *args[1:], **options), hidden)
        finally:
            _deferred.reset(before)
        if isinstance(hidden, BatchTracer) and not any(_is_mapped(x, hidden) for x in head.arrays):
            head = Called(ClosedOver(head.arrays), head.jaxpr, head.rank, head.logits)
        return Linear(hidden, head)

    return called


def _alike(module: Any) -> Callable[[], Any]:
    """A function that gives the module, or of Flax NNX a copy. It is called where the head is traced: there Flax
    refuses to let the module itself be written to, which Qwix does when it multiplies."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(module, nnx.Module):
        return lambda: module
    parts = nnx.split(module)
    return lambda: nnx.merge(*parts)


def _astype(original: Callable) -> Callable:
    @functools.wraps(original)
    def astype(x, dtype, /, **options):
        return x.astype(dtype) if isinstance(x, Linear) else original(x, dtype, **options)

    return astype


class ClosedOver(tuple):
    """Arrays that a vmap around doesn't map. They are no leaves of a `Linear`: a leaf that the function under the vmap
    returns comes out of it with the batch's axis, a copy for each member."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:  # a tuple's own would compare arrays
        return self is not other

    def __hash__(self) -> int:
        return id(self)


jax.tree_util.register_static(ClosedOver)


def _is_mapped(x: Any, hidden: Any) -> bool:
    """Whether the vmap that maps the hidden states maps x too."""
    return isinstance(x, BatchTracer) and x._trace is hidden._trace
