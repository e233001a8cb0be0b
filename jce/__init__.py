"""Entropy, cross-entropy and KL divergence of discrete distributions, in nats, exact at every corner.

    H(p) = Σ pᵢ log 1/pᵢ        H(p, q) = Σ pᵢ log 1/qᵢ        KL(p‖q) = Σ pᵢ log pᵢ/qᵢ = H(p, q) - H(p) ≥ 0

Pure, jitted functions of arrays, each with its closed-form derivative as a `custom_jvp` rule: they work under `jit`,
`vmap`, `grad`, `jvp` and every nesting of them, to any order. The target comes first, the model second: H(p, q).
"""

from importlib.metadata import version as _version

from jce._binary import binary_cross_entropy as binary_cross_entropy
from jce._binary import binary_entropy as binary_entropy
from jce._binary import binary_kl_divergence as binary_kl_divergence
from jce._check import check_distribution as check_distribution
from jce._cross_entropy import cross_entropy as cross_entropy
from jce._entropy import entropy as entropy
from jce._kl_divergence import generalized_kl_divergence as generalized_kl_divergence
from jce._kl_divergence import kl_divergence as kl_divergence

__version__ = _version("jce")
