"""A head's loss with every option, computed from the logits of all tokens: the plain formula, for use in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def losses(
    labels,
    hidden,
    head,
    bias=None,
    *,
    label_probs=None,
    tail=False,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_soft_cap=None,
    temperature=1.0,
):
    """One number per token, for labels [N], or [N, k] with `label_probs`. A token's k labels must be distinct."""
    x = _logits(hidden, head, bias, logit_soft_cap, temperature)
    log_z = jax.nn.logsumexp(x, -1)
    p = jnp.ones((len(labels), 1)) if label_probs is None else label_probs
    log_q = jnp.take_along_axis(x, labels.reshape(len(labels), -1), 1) - log_z[:, None]
    loss, of_tail = -(p * log_q).sum(-1), 0
    if tail:
        of_tail = (p.sum(-1) - 1) * jnp.log1p(-jnp.exp(log_q).sum(-1))
    if not isinstance(label_smoothing, float) or label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * p.sum(-1) * (log_z - x.mean(-1))
    return loss + of_tail + z_loss * log_z**2


def reduced(labels, hidden, head, bias=None, *, weights=None, where=None, reduction="mean", **options):
    loss = losses(labels, hidden, head, bias, **options)
    w = jnp.ones_like(loss) if weights is None else weights
    w = w if where is None else jnp.where(where, w, 0)
    if reduction == "none":
        return w * loss
    return (w * loss).sum() / (w.sum() if reduction == "mean" else 1)


def _logits(hidden, head, bias, logit_soft_cap, temperature):
    """The logits. A bias of -∞ is kept out of every derivative."""
    forbidden = jnp.zeros(len(head), bool) if bias is None else bias == -jnp.inf
    x = hidden @ head.T
    if bias is not None:
        x = x + jnp.where(forbidden, 0, bias)[None]
    if logit_soft_cap is not None:
        x = logit_soft_cap * jnp.tanh(x / logit_soft_cap)
    x = x / jnp.broadcast_to(temperature, (len(hidden),))[:, None]
    return jnp.where(forbidden[None], -jnp.inf, x)
