"""`Linear`: hidden states and a head, in place of the logits that can be computed from them."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn, get_type_hints

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jce._heads.loss.function_head import FunctionHead
from jce._jax.arguments import brief, float_dtype, is_function


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """Stands for the logits hidden · headᵀ + bias of many tokens, which are never all in memory at once.

    Example:
      >>> print(jce.linear_map(jnp.argmax, jce.Linear(jnp.eye(2), 20 * jnp.eye(3, 2))))
      [0 1]

    Pass a `Linear` to the `linear_*` functions, which compute its logits one chunk of tokens at a time. A model may
    return a `Linear` instead of logits. For a model that you did not write, replace the head in a shallow copy (here
    with Flax NNX). Make the copy inside the function that you differentiate or compile:

        changed = copy.copy(model)  # `model` itself stays as it is
        changed.lm_head = lambda h: jce.Linear(h, model.lm_head)
        loss = jce.linear_cross_entropy(labels, changed(tokens))

    For tied embeddings, Equinox, Linen and Qwix, and for models that cast or cap their logits, see "A model that you
    did not write" in jce/README.md.

    To select tokens, index a `Linear` with slices and ints, as in x[:, :-1]. `x.astype(jnp.float32)` returns x if its
    logits are float32. Arithmetic, comparisons and functions of arrays raise an error. Functions of pytrees don't:
    `jax.tree.map` and `jax.lax.psum` change the arrays that x consists of, so don't apply them to it.

    The head may be a function, for example one with a low-rank update, a normalization, or weights in another layout:

        Linear(hidden, lambda h: h @ kernel + (h @ a) @ b)

    The function is traced once, when the `Linear` is made, with one token's state. This trace is then applied to every
    token by `jax.vmap`. So the function must treat each token alone: its result and its derivatives must not depend on
    other tokens, on the number of tokens, or on the token's position. To check it, compare head(h)[i] with
    head(h[i:i+1])[0]. Random draws and side effects raise an error. Other violations cannot be detected in a trace.

    Arrays that the function closes over are its weights, and leaves of the `Linear`. They are differentiated, each in
    its own dtype, and their gradients are summed over chunks of tokens in float32. A function that returns
    half-precision logits causes a warning, because their rounding errors would reach the losses. To get float32 logits
    from a half-precision matmul, write

        lambda h: jnp.matmul(h, kernel, preferred_element_type=jnp.float32)

    Args:
      hidden: real, [..., d]: one state per token.
      head: real, [n, d]: one row per class. For a Dense layer of Flax this is kernel.T, even if n = d. Or a function
        that maps states to logits. It is called with the state of one token, of shape [1, …, 1, d], and must
        return logits of shape [1, …, 1, n]. Bound methods, Flax NNX modules and `jax.tree_util.Partial` are
        functions too, and so are Equinox modules under `jax.vmap`.
      bias: real, [n], or None. A bias of -∞ forbids a class: its logit is -∞, even with a soft cap. If head is a
        function, bias must be None: the function adds a bias itself.
      logit_soft_cap: c > 0: the logits are then c tanh((hidden · headᵀ + bias)/c). None for no cap.

    Returns:
      An argument for the `linear_*` functions. In `linear_cross_entropy` and `linear_log_probs` it takes the place of
      hidden, head, bias and logit_soft_cap, which are its attributes. It is a pytree of arrays, and so passes through
      `jax.jit`, `jax.grad` and other transformations. The trace of a function, and a soft cap that is a Python number,
      are static.

    Raises:
      ValueError: when it is made, if a function does not return logits, draws random numbers, has a side effect, or is
        given together with a bias. In the `linear_*` functions, if shapes disagree, if the cap is not greater than 0,
        or if the head is a function and `on_mesh` or axis_name splits the tokens or classes.

    See "Arguments of heads" and "A model that you did not write" in jce/README.md.
    """

    hidden: ArrayLike
    head: Any
    bias: ArrayLike | None = None
    logit_soft_cap: ArrayLike | None = None
    # Without these attributes, operations of Python, NumPy and JAX would succeed, with results that are wrong.
    __array_ufunc__ = None  # NumPy's functions, and operators with NumPy arrays, raise a TypeError
    __iter__ = None  # otherwise [*x] would index x forever, since an index beyond the end is clipped

    def __post_init__(self):
        if is_function(self.head):
            object.__setattr__(self, "head", FunctionHead.of("Linear", self.head, self.hidden, self.bias))

    @property
    def of_function(self) -> bool:
        """Whether its head is a function."""
        return isinstance(self.head, FunctionHead)

    def __getitem__(self, index: Any) -> Linear:
        """Selects tokens by slices and ints of the token axes. A full slice `:` may follow, for the axis of classes."""
        places, h = index if isinstance(index, tuple) else (index,), jnp.asarray(self.hidden)
        if places and places[0] is ...:
            places = (slice(None),) * (h.ndim - len(places) + 1) + places[1:]
        if len(places) == h.ndim and places[-1] == slice(None):
            places = places[:-1]
        if len(places) >= h.ndim or not all(type(i) in (int, slice) for i in places):
            self._refuse()
        return dataclasses.replace(self, hidden=h[places])

    def astype(self, dtype: Any) -> Linear:
        """Returns the `Linear` itself if its logits have this dtype. Other dtypes raise a TypeError."""
        if jnp.dtype(dtype) != _logits_dtype(self):
            self._refuse()
        return self

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"Linear: it stands for logits that are never computed all at once. So it must not be used as an array,"
            f" compared, or cast to another dtype, and its index must be slices and ints for token axes; got {self!r}."
            f" Pass it to jce.linear_cross_entropy, linear_log_probs, linear_kl_divergence or linear_map. To change the"
            f" logits, use temperature= and logit_soft_cap=, or do it in the function that linear_map takes."
        )

    __array__ = __jax_array__ = __bool__ = __eq__ = _refuse  # see the comment above __array_ufunc__

    def _taken_by(self, function: str, argument: str) -> str:
        """A sentence for the error of a function that got a `Linear` as an array: which functions accept one."""
        if "logits" in argument:
            fused = f"{FUSED[function]}, or " if function in FUSED else ""
            return f"For a Linear use {fused}jce.linear_map(jce.{function}, ...) with the same positional arguments."
        return (
            "A Linear stands for the logits of hidden states and their head. Pass it, after the target, to"
            " jce.linear_cross_entropy, linear_log_probs or linear_kl_divergence, or to jce.linear_map with a function"
            " of logits, such as jce.entropy_with_logits."
        )

    def __repr__(self) -> str:
        """Shows arrays by their shapes and dtypes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return f"Linear({', '.join(f'{name}={_shown(x)}' for name, x in fields.items())})"


# For each function of logits, the function that takes a Linear instead.
FUSED = {
    "cross_entropy_with_integer_labels": "jce.linear_cross_entropy",
    "log_probs_with_integer_labels": "jce.linear_log_probs",
    "kl_divergence_with_logits": "jce.linear_kl_divergence if both are Linears",
}


def _logits_dtype(x: Linear):
    if isinstance(x.head, FunctionHead):
        return x.head.logits.dtype
    return float_dtype("Linear", {"hidden": x.hidden, "head": x.head} | ({} if x.bias is None else {"bias": x.bias}))


def _shown(x: Any) -> str:
    if isinstance(x, FunctionHead):
        return f"a function that returns {brief(x.logits)}"
    return brief(x) if hasattr(x, "shape") and hasattr(x, "dtype") else repr(x)


def _flatten(x: Linear):
    cap = x.logit_soft_cap
    # A bool is not a cap, but a leaf: it is in the cap's place in a pytree of bools that mark the leaves of a `Linear`.
    number = cap if isinstance(cap, (int, float)) and not isinstance(cap, bool) else None
    children = {"hidden": x.hidden, "head": x.head, "bias": x.bias, "logit_soft_cap": cap if number is None else None}
    return [(jax.tree_util.GetAttrKey(name), child) for name, child in children.items()], number


def _unflatten(number, children) -> Linear:
    hidden, head, bias, cap = children
    return Linear(hidden, head, bias, cap if number is None else number)


jax.tree_util.register_pytree_with_keys(Linear, _flatten, _unflatten)
# Annotations must be types here. Strings would be looked up in jce, because `Linear.__module__` is jce.
Linear.__annotations__ = get_type_hints(Linear)
