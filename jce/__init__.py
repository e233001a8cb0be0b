"""Entropy, cross-entropy and KL divergence of discrete distributions, in nats, exact at probabilities of 0.

For distributions p and q on n outcomes, 0 ≤ pᵢ, qᵢ ≤ 1 and Σ pᵢ = Σ qᵢ = 1, where p is the target and q the model:

    entropy         H(p) = Σ pᵢ log 1/pᵢ
    cross-entropy   H(p, q) = Σ pᵢ log 1/qᵢ
    KL divergence   KL(p‖q) = Σ pᵢ log pᵢ/qᵢ = H(p, q) - H(p) ≥ 0, and 0 only at q = p

So H(p, q) ≥ H(p) ≥ 0. Neither H(p, q) nor KL(p‖q) is symmetric. They differ by H(p), which doesn't depend on q, so as
functions of q they have the same minimizer, q = p, and the same gradient,

    ∂H(p, q)/∂qᵢ = -pᵢ/qᵢ          at q = softmax(x):  ∂H/∂xᵢ = qᵢ - pᵢ

With two outcomes, p = {α, 1-α} and q = {β, 1-β}:

    H(p, q) = α log 1/β + (1-α) log 1/(1-β)
    ∂H/∂β = (β-α)/(β(1-β))         at β = σ(x):  ∂H/∂x = β - α

At zeros, values are limits from inside the domain: 0 log 0 = 0; an outcome with pᵢ = 0 costs nothing, whatever qᵢ is;
one with pᵢ > 0 = qᵢ costs +∞. An infinite derivative times an exact 0 is 0. Each docstring lists more such cases under
"At the boundary". What many functions have in common, such as `where` and `axis_name`, is in the file README.md of this
package, in the sections that the last line of a docstring names.

Names are `<quantity>[_with_<form>]`: `cross_entropy(p, q)` of probabilities, `cross_entropy_with_logits(p, logits)` of
the model's logits (or log-probabilities), `cross_entropy_with_integer_labels(labels, logits)` of one-hot targets;
`binary_...` of one probability or logit, elementwise; `linear_...` of hidden states and a head (a model's output
projection, with many classes), whose full logits are never in memory. The target comes first and the model second, as
in H(p, q). If probabilities would come from a softmax or a sigmoid, use the forms with logits: an underflow to 0 can't
be undone.

A "real" argument is floating-point of at least 16 bits, integer or bool. Gradients come back in their argument's dtype,
and a float of 8 bits would round most of them to 0.

All are pure functions of arrays, each with its closed-form derivative as a `custom_jvp` rule: they work under `jit`,
`vmap`, `grad`, `jvp` and every nesting of them, to any order. All are jitted, except `linear_map` and calls whose head
is a function. Outside of `jax.jit`, each such call compiles a program, which takes some tenths of a second: call them
inside of your own jitted step. `jax.export` accepts the functions with a symbolic number of rows or tokens. They don't
work under `jax.experimental.jet`, which does not support `custom_jvp` rules.

>>> import jax, jax.numpy as jnp, jce
>>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
>>> print(jce.cross_entropy(p, q), jce.kl_divergence(p, q) + jce.entropy(p))
1.0397208 1.0397208
>>> print(jax.grad(jce.cross_entropy, 1)(p, q))
[-2. -1. -0.]
"""

import importlib.metadata as _metadata

import jce._programs.interrupts as _interrupts  # noqa: F401, before JAX, whose import takes a second
from jce._heads.linear import Linear
from jce._heads.linear_cross_entropy import linear_cross_entropy
from jce._heads.linear_kl_divergence import linear_kl_divergence
from jce._heads.linear_log_probs import linear_log_probs
from jce._heads.linear_map import linear_map
from jce._heads.on_mesh import on_mesh
from jce._quantities.binary import binary_cross_entropy, binary_entropy, binary_kl_divergence
from jce._quantities.binary_kl_divergence_with_logits import binary_kl_divergence_with_logits
from jce._quantities.binary_with_logits import binary_cross_entropy_with_logits, binary_entropy_with_logits
from jce._quantities.check import check_distribution
from jce._quantities.cross_entropy import cross_entropy, cross_entropy_with_integer_labels, cross_entropy_with_logits
from jce._quantities.entropy import entropy, entropy_with_logits
from jce._quantities.jensen_shannon import jensen_shannon_divergence
from jce._quantities.jensen_shannon_with_logits import jensen_shannon_divergence_with_logits
from jce._quantities.kl_divergence import generalized_kl_divergence, kl_divergence
from jce._quantities.kl_divergence_with_logits import kl_divergence_with_logits
from jce._quantities.log_probs_with_integer_labels import log_probs_with_integer_labels
from jce._quantities.sampled_kl_divergence import sampled_kl_divergence

__all__ = [
    "Linear",
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
    "jensen_shannon_divergence",
    "jensen_shannon_divergence_with_logits",
    "kl_divergence",
    "kl_divergence_with_logits",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_log_probs",
    "linear_map",
    "log_probs_with_integer_labels",
    "on_mesh",
    "sampled_kl_divergence",
]
# Without this, pickles and pages would name private files, which may move.
for _name in __all__:
    globals()[_name].__module__ = __name__
try:
    __version__ = _metadata.version("jce")
except _metadata.PackageNotFoundError:  # when the folder was copied into another project or built without pip
    __version__ = "0+unknown"
