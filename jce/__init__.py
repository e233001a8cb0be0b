"""Entropy, cross-entropy and KL divergence of discrete distributions, in nats, exact at every corner.

    H(p) = Σ pᵢ log 1/pᵢ        H(p, q) = Σ pᵢ log 1/qᵢ        KL(p‖q) = Σ pᵢ log pᵢ/qᵢ = H(p, q) - H(p) ≥ 0

Pure, jitted functions of arrays, each with its closed-form derivative as a `custom_jvp` rule: they work under `jit`,
`vmap`, `grad`, `jvp` and every nesting of them, to any order. The target comes first, the model second: H(p, q).
"""

from importlib.metadata import version as _version

from jce._binary import binary_cross_entropy, binary_entropy, binary_kl_divergence
from jce._binary_with_logits import (
    binary_cross_entropy_with_logits,
    binary_entropy_with_logits,
    binary_kl_divergence_with_logits,
)
from jce._check import check_distribution
from jce._cross_entropy import cross_entropy, cross_entropy_with_integer_labels, cross_entropy_with_logits
from jce._entropy import entropy, entropy_with_logits
from jce._kl_divergence import generalized_kl_divergence, kl_divergence, kl_divergence_with_logits
from jce._linear_cross_entropy import linear_cross_entropy
from jce._linear_log_probs import linear_log_probs
from jce._sharded_linear_cross_entropy import sharded_linear_cross_entropy

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "binary_entropy",
    "binary_entropy_with_logits",
    "binary_kl_divergence",
    "binary_kl_divergence_with_logits",
    "check_distribution",
    "cross_entropy",
    "cross_entropy_with_integer_labels",
    "cross_entropy_with_logits",
    "entropy",
    "entropy_with_logits",
    "generalized_kl_divergence",
    "kl_divergence",
    "kl_divergence_with_logits",
    "linear_cross_entropy",
    "linear_log_probs",
    "sharded_linear_cross_entropy",
]
__version__ = _version("jce")
