"""KL(p‖q) between the softmaxes of two heads, per token, without the logits of all tokens."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jce._heads.arguments.options import Options
from jce._heads.linear import Linear
from jce._heads.loss.chunk import ChunkFunction
from jce._heads.loss.function_head import FunctionHead
from jce._heads.over_tokens import over_tokens
from jce._jax.arguments import described, is_array, positive
from jce._jax.classes import Classes
from jce._jax.public import public
from jce._quantities.kl_divergence_with_logits import kl_of_softmax
from jce._softmax.compare import at_common_temperature


@public("reduction", "chunk_size", "batch_invariant", "precision", "axis_name", numbers=("temperature",))
def linear_kl_divergence(
    p: Linear,
    q: Linear,
    *,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
    temperature: ArrayLike = 1.0,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    precision: Any = None,
    axis_name: Hashable | None = None,
) -> Array:
    """KL(p‖q) between the softmaxes of two heads, in nats: distillation of a teacher p into a student q.

    Example:
      >>> hidden, teacher, student = jnp.eye(2), 20 * jnp.eye(3, 2), 21 * jnp.eye(3, 2)
      >>> print(jce.linear_kl_divergence(jce.Linear(hidden, teacher), jce.Linear(hidden, student)))
      1.5165121e-09

    A token's loss is `kl_divergence_with_logits` at the logits of both heads, each divided by T, and the default result
    is the mean. But the logits exist for one chunk of tokens at a time, in the value and in derivatives of any order.
    The hidden states of teacher and student may differ in width. A mean or a sum with its gradient costs four matmuls
    if p is frozen (not differentiated, or behind `jax.lax.stop_gradient`), and six if both are differentiated. Losses
    per token with their gradient cost one more matmul for each head.

    The loss isn't multiplied by T². To keep its gradient about as large as without a temperature, multiply the loss by
    temperature**2, as Hinton, Vinyals and Dean (2015) do.

    Args:
      p: the target, the teacher: `jce.Linear(hidden, head)`, with hidden states [..., d] and a head [n, d].
      q: the model, the student: `jce.Linear(hidden, head)`, with the same n classes and its own width.
      weights: real, broadcast to the token axes: w, one weight per token, by default 1. If they sum to 0, as RL
        advantages can, a mean is 0: use reduction="sum".
      where: bool, broadcast to the token axes. Tokens where it is False are masked: their divergence and weight are 0,
        and they cost no matmul.
      reduction: "mean" for Σ w KL / Σ w, "sum" for Σ w KL, "none" for w KL, one number per token.
      temperature: T > 0, a number. The division by T is done after the subtraction of the two rows of logits, so
        similar heads are compared as accurately as at T = 1. If you divide both rows yourself and call
        `kl_divergence_with_logits`, each division rounds, and that accuracy is lost.
      chunk_size: the number of tokens per chunk, a static int. None for the rule of `linear_cross_entropy`.
      batch_invariant: a static bool: whether a token's result has the same bits in every batch. It needs a chunk_size.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`. None for JAX's setting.
      axis_name: inside `jax.shard_map`, the mesh axis that splits the classes. With check_vma=False,
        differentiate outside of the `shard_map`: `jax.grad` inside it returns wrong gradients.

    Returns:
      A number, or [...] for "none". float32, or float64 if states, heads, biases or weights are float64. With weights
      ≥ 0 it is never negative. Its relative error is small even when student and teacher are similar.

    At the boundary:
      A class with a bias of -∞ in p contributes 0. A class with a bias of -∞ only in q makes the token's loss +∞, and
      its derivative with respect to a traced temperature NaN.

    Derivative:
      ∂KL/∂yᵢ = (qᵢ - pᵢ)/T for q's logits y, ∂KL/∂xᵢ = pᵢ (log pᵢ/qᵢ - KL)/T for p's logits x, and, by the chain rule,
      derivatives with respect to hidden states, heads, biases, weights, a traced temperature and traced soft caps. Each
      gradient has its argument's dtype. Derivatives exist in forward and reverse mode, to any order.

    Raises:
      TypeError: p or q is not a Linear, an array is not real, or `where` is not boolean.
      ValueError: shapes disagree, or an option has a value that is not listed above.

    Not checked:
      Values inside of arrays. A NaN in a token's hidden state makes the results of this token NaN.

    See "Arguments of heads", "Classes split over devices" and "Conventions" in jce/README.md.
    """
    name = "linear_kl_divergence"
    for argument, x in (("p", p), ("q", q)):
        if not isinstance(x, Linear):
            raise TypeError(
                f"{name}: {argument} must be a jce.Linear; got {'an array' if is_array(x) else type(x).__name__}."
                f" Pass jce.Linear(hidden, head), the target first."
            )
    heads = {"p.head": p.head, "q.head": q.head}
    rows = {key: x.logits if isinstance(x, FunctionHead) else x for key, x in heads.items()}
    if len({jnp.shape(x)[:1] for x in rows.values()}) > 1:
        raise ValueError(
            f"{name}: p and q must have the same classes, and so the same number of rows in both heads; got"
            f" {described(rows)}. Slice both heads to the classes that they share: head[:n]."
        )
    t = positive(name, jnp.result_type(float), temperature=temperature)
    options = Options(where, weights, reduction, chunk_size, precision, axis_name, batch_invariant)
    traced, number = ((t,), None) if is_array(t) else ((), t)
    make = functools.partial(_chunk_function, number)
    return over_tokens(name, make, {"p": p, "q": q}, {}, options, traced)


def _chunk_function(number, logits, _, shared, class_axis):
    """KL between the two rows of logits of each token. T is `number`, or the traced number in `shared` if that is
    None."""
    classes = Classes(-1, class_axis)

    def kl(logits, _, traced, closed_over):
        x, y = logits
        t = traced[0] if number is None else number
        return [kl_of_softmax(*at_common_temperature(x, y, t, classes), classes)]

    double = jnp.float64 in [x.dtype for x in logits]
    return ChunkFunction(kl, jax.ShapeDtypeStruct((), jnp.float64 if double else jnp.float32))
