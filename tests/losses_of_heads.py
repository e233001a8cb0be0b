"""The public `linear_*` functions, wrapped so that they return one number, for tests of the code around a call.

The labels are the same in every call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jce
from jce import Linear

ce = jce.cross_entropy_with_integer_labels


def losses(tokens: int, chunk: int) -> dict:
    """The functions by name. Their arguments are hidden states, a head, and a number t > 0, which only some use."""
    y, k = jnp.arange(tokens) % 3, {"chunk_size": chunk}
    lists = {"label_probs": jnp.full((tokens, 2), 0.4, np.float32), "tail": True}
    keys = jax.random.split(jax.random.key(0), tokens)
    constant = np.float32([0.5, 2.0])

    def reals_and_a_sample(key, x):
        return {"reals": [x.max(), x.sum()], "sample": jax.random.categorical(key, x)}

    def total(tree):
        return sum(jnp.sum(x) for x in jax.tree.leaves(tree))

    return {
        "mean": lambda h, w, t: jce.linear_cross_entropy(y, h, w, **k),
        "smoothed": lambda h, w, t: jce.linear_cross_entropy(y, h, w, label_smoothing=0.1, z_loss=0.1, **k),
        "some": lambda h, w, t: jce.linear_cross_entropy(y, h, w, where=y.astype(t.dtype) < t, **k),
        "none": lambda h, w, t: jce.linear_cross_entropy(y, h, w, reduction="none", logit_soft_cap=t, **k).sum(),
        "lists": lambda h, w, t: jce.linear_cross_entropy(jnp.stack([y, y + 1], 1), h, w, **lists, **k),
        "log-probabilities": lambda h, w, t: total(jce.linear_log_probs(y, h, w, logit_soft_cap=t, **k)),
        "divergence": lambda h, w, t: jce.linear_kl_divergence(
            Linear(2 * h, w), Linear(h, w), temperature=t, reduction="none", **k
        ).sum(),
        "divergence of some tokens": lambda h, w, t: jce.linear_kl_divergence(
            Linear(2 * h, w), Linear(h, w), temperature=t, where=y.astype(t.dtype) < t, **k
        ),
        "map of one number": lambda h, w, t: jce.linear_map(ce, y, Linear(h, w), reduction="sum", **k),
        "map of each": lambda h, w, t: jce.linear_map(lambda y, x: ce(y, x / t), y, Linear(h, w), **k).sum(),
        "a number and a bool": lambda h, w, t: total(
            jce.linear_map(lambda y, x: (ce(y, x), x.argmax() == y), y, Linear(h, w), reduction="mean", **k)
        ),
        "map of some tokens": lambda h, w, t: jce.linear_map(
            lambda y, x: ce(y, x / t), y, Linear(h, w), where=y.astype(t.dtype) < t, **k
        ).sum(),
        "integers": lambda h, w, t: jce.linear_map(jnp.argmax, Linear(h, w), reduction="sum", **k),
        "reals and a sample": lambda h, w, t: total(
            jce.linear_map(reals_and_a_sample, keys, Linear(h, w), reduction="sum", **k)
        ),
        "closing over arrays": lambda h, w, t: jce.linear_map(
            lambda x: jax.jit(lambda x: x[:2] @ jnp.asarray(constant))(x) * t, Linear(h, w), reduction="sum", **k
        ),
    }
