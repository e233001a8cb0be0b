"""The functions that are measured: those of jce, and the same functions in other libraries, with the target first.

If a library does not have the function, the shortest way to write it is used. Distrax normalizes the probabilities that
it gets, which makes it another function. So distrax appears only for logits and for its Bernoulli distribution.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr, kl_div, rel_entr, xlog1py, xlogy

import jce
from bench.engines import Jax, NumPy, Torch, optional, torch
from tests.kernels import BETA, LOGIT, ROWS, SMOOTHING, Z_LOSS, Kernel, at_beta

optax, distrax, tokamax = optional("optax"), optional("distrax"), optional("tokamax")
jax_cce, special = optional("jax_cce"), optional("scipy.special")
if absl_flags := tokamax and optional("absl.flags"):
    absl_flags.FLAGS.mark_as_parsed()  # or tokamax would parse this program's command line
F = torch and torch.nn.functional
D = torch and torch.distributions

JAX, TORCH, NUMPY = Jax(), Torch(), NumPy()
# For each library: its module, or None if it isn't installed, and the engine that runs it.
LIBRARIES = {
    "jce": (jce, JAX),
    "jax": (jax, JAX),
    "optax": (optax, JAX),
    "distrax": (distrax, JAX),
    "tokamax": (tokamax, JAX),
    "jax-cce": (jax_cce, JAX),
    "torch": (torch, TORCH),
    "scipy": (special, NUMPY),
}


def named(library: str) -> tuple:
    """The module and its engine. After a comma, the name may say how the library is used, as in "jax, scan"."""
    return LIBRARIES[library.partition(",")[0]]


def installed(library: str) -> bool:
    return named(library)[0] is not None


def engine_of(library: str) -> Jax | Torch | NumPy:
    return named(library)[1]


def version(library: str) -> str:
    return jce.__version__ if library == "jce" else importlib.metadata.version(library)


def missing() -> list[str]:
    return [name for name, (module, _) in LIBRARIES.items() if module is None]


@dataclass(frozen=True)
class Task:
    """A function of jce, its row in the tests' table, and the same function in each library.

    `kind` says which arguments the functions take:

    - "rows": the arguments of the table's row
    - "labels": labels and logits
    - "head": labels, hidden states and a head; the functions return the sum over tokens
    - "two heads": hidden states and head of a frozen teacher p, then of a student; returns the sum over tokens
    """

    name: str
    row: str
    functions: dict[str, Callable]
    kind: str = "rows"
    note: str = ""

    @property
    def kernel(self) -> Kernel:
        return ROWS[self.row]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.note}" if self.note else self.name

    @property
    def has_labels(self) -> bool:
        return self.kind in ("labels", "head")

    @property
    def has_heads(self) -> bool:
        return self.kind in ("head", "two heads")

    @property
    def places(self) -> tuple[int, ...]:
        """The positions of the table row's arguments. They follow the labels, and each comes before its head."""
        first, step = int(self.has_labels), 1 + self.has_heads
        return tuple(range(first, first + step * len(self.kernel.arguments), step))

    @property
    def heads(self) -> tuple[int, ...]:
        """The positions of the heads. Each comes after its hidden states."""
        return tuple(i + 1 for i in self.places) if self.has_heads else ()

    @property
    def trained(self) -> tuple[int, ...]:
        """The positions that a user differentiates with respect to: the last argument, or hidden states and head."""
        return (self.places[-1], *self.heads[-1:])

    def contenders(self, platform: str = "cpu") -> dict[str, Callable]:
        return {name: f for name, f in self.functions.items() if installed(name) and engine_of(name).on(platform)}

    def from_row(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Arguments for which the functions equal the table's row: labels 0, and identity matrices as heads."""
        labels = [np.zeros(arrays[0].shape[:-1], np.int32)] if self.has_labels else []
        if not self.has_heads:
            return labels + arrays
        return labels + [part for x in arrays for part in (x, np.eye(x.shape[-1], dtype=x.dtype))]

    def shapes(self, tokens: int, n: int, width: int) -> list[tuple[tuple[int, ...], np.dtype]]:
        number, integer = np.dtype(np.float32), np.dtype(np.int32)
        labels = [((tokens,), integer)] if self.has_labels else []
        logits = [((tokens, width), number), ((n, width), number)] if self.has_heads else [((tokens, n), number)]
        return labels + logits * len(self.kernel.arguments)

    def sample(self, rng: np.random.Generator, tokens: int, n: int, width: int) -> list[np.ndarray]:
        """Random arguments of the shapes that `shapes` returns."""

        def draw(shape, dtype, domain):
            if dtype == np.int32:
                return rng.integers(n, size=shape, dtype=dtype)
            x = rng.standard_normal(shape, dtype)
            if domain == LOGIT:
                return 3 * x
            e = np.exp(x)
            return e / (1 + e) if domain == (0, 1) else e / e.sum(-1, keepdims=True)

        shapes = self.shapes(tokens, n, width)
        if self.has_heads:
            arrays = [draw(*s, LOGIT) for s in shapes]
            return [x / np.float32(3 * np.sqrt(width)) if i in self.heads else x for i, x in enumerate(arrays)]
        domains = [None] * (len(shapes) - len(self.kernel.domains)) + list(self.kernel.domains)
        return [draw(*s, domain) for s, domain in zip(shapes, domains, strict=True)]


def surprisal(x):
    return -jax.nn.log_softmax(x)


def torch_surprisal(x):
    return -F.log_softmax(x, -1)


def scipy_surprisal(x):
    return -special.log_softmax(x, -1)


def of_label(surprisals, y):
    return jnp.take_along_axis(surprisals, y[..., None], -1)[..., 0]


def several(y, x):
    """Eight labels per row, of which the first is the label of the row."""
    return (y[..., None] + np.arange(8, dtype=y.dtype)[None]) % x.shape[-1]


def smoothed_labels(y, x):
    return optax.smooth_labels(jax.nn.one_hot(y, x.shape[-1], dtype=x.dtype), SMOOTHING)


def to_mixture(rel_entr, p, q):
    m = BETA * p + (1 - BETA) * q
    return BETA * rel_entr(p, m) + (1 - BETA) * rel_entr(q, m)


def to_mixture_of_logits(library, log_p, log_q):
    log_m = library.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    terms = BETA * library.exp(log_p) * (log_p - log_m), (1 - BETA) * library.exp(log_q) * (log_q - log_m)
    return sum(terms)


def kl_of_two_heads(hp, wp, h, w, most=512, logits=lambda h, w: h @ w.T):
    """Σ KL(p‖q) over tokens, in equal chunks of at most `most` tokens. Only one chunk has logits at a time."""
    size = max(k for k in range(1, most + 1) if len(h) % k == 0)

    def of_chunk(total, chunk):
        p, q = (jax.nn.log_softmax(logits(*linear)) for linear in zip(chunk, (wp, w), strict=True))
        return total + (jnp.exp(p) * (p - q)).sum(), None

    chunks = [x.reshape(-1, size, x.shape[-1]) for x in (hp, h)]
    return jax.lax.scan(jax.checkpoint(of_chunk), jnp.zeros(()), chunks)[0]


ENTROPY_OF_A_HEAD = {
    "jax": lambda y, h, w: (lambda x: (jax.nn.softmax(x) * surprisal(x)).sum())(h @ w.T),
    "distrax": lambda y, h, w: distrax.Categorical(logits=h @ w.T).entropy().sum(),
    "torch": lambda y, h, w: D.Categorical(logits=h @ w.T).entropy().sum(),
}


def label_with(**options):
    return functools.partial(jce.cross_entropy_with_integer_labels, **options)


TASKS = [
    Task(
        "entropy",
        "entropy",
        {
            "jce": jce.entropy,
            "jax": lambda p: entr(p).sum(-1),
            "torch": lambda p: torch.special.entr(p).sum(-1),
            "scipy": lambda p: special.entr(p).sum(-1),
        },
    ),
    Task(
        "cross_entropy",
        "cross_entropy",
        {
            "jce": jce.cross_entropy,
            "jax": lambda p, q: -xlogy(p, q).sum(-1),
            "torch": lambda p, q: -torch.xlogy(p, q).sum(-1),
            "scipy": lambda p, q: -special.xlogy(p, q).sum(-1),
        },
    ),
    Task(
        "kl_divergence",
        "kl_divergence",
        {
            "jce": jce.kl_divergence,
            "jax": lambda p, q: rel_entr(p, q).sum(-1),
            "optax": lambda p, q: optax.losses.kl_divergence(jnp.log(q), p),
            "torch": lambda p, q: F.kl_div(q.log(), p, reduction="none").sum(-1),
            "scipy": lambda p, q: special.rel_entr(p, q).sum(-1),
        },
    ),
    Task(
        "generalized_kl_divergence",
        "generalized_kl_divergence",
        {
            "jce": jce.generalized_kl_divergence,
            "jax": lambda p, q: kl_div(p, q).sum(-1),
            "scipy": lambda p, q: special.kl_div(p, q).sum(-1),
        },
    ),
    Task(
        "jensen_shannon_divergence",
        "jensen_shannon_divergence",
        {
            "jce": at_beta(jce.jensen_shannon_divergence),
            "jax": lambda p, q: to_mixture(rel_entr, p, q).sum(-1),
            "scipy": lambda p, q: to_mixture(special.rel_entr, p, q).sum(-1),
        },
    ),
    Task(
        "binary_entropy",
        "binary_entropy",
        {
            "jce": jce.binary_entropy,
            "jax": lambda a: entr(a) + entr(1 - a),
            "distrax": lambda a: distrax.Bernoulli(probs=a).entropy(),
            "torch": lambda a: D.Bernoulli(probs=a).entropy(),
            "scipy": lambda a: special.entr(a) + special.entr(1 - a),
        },
    ),
    Task(
        "binary_cross_entropy",
        "binary_cross_entropy",
        {
            "jce": jce.binary_cross_entropy,
            "jax": lambda a, b: -xlogy(a, b) - xlog1py(1 - a, -b),
            "distrax": lambda a, b: distrax.Bernoulli(probs=a).cross_entropy(distrax.Bernoulli(probs=b)),
            "torch": lambda a, b: F.binary_cross_entropy(b, a, reduction="none"),
            "scipy": lambda a, b: -special.xlogy(a, b) - special.xlog1py(1 - a, -b),
        },
    ),
    Task(
        "binary_kl_divergence",
        "binary_kl_divergence",
        {
            "jce": jce.binary_kl_divergence,
            "jax": lambda a, b: rel_entr(a, b) + rel_entr(1 - a, 1 - b),
            "distrax": lambda a, b: distrax.Bernoulli(probs=a).kl_divergence(distrax.Bernoulli(probs=b)),
            "torch": lambda a, b: D.kl_divergence(D.Bernoulli(probs=a), D.Bernoulli(probs=b)),
            "scipy": lambda a, b: special.rel_entr(a, b) + special.rel_entr(1 - a, 1 - b),
        },
    ),
    Task(
        "entropy_with_logits",
        "entropy_with_logits",
        {
            "jce": jce.entropy_with_logits,
            "jax": lambda x: (jax.nn.softmax(x) * surprisal(x)).sum(-1),
            "distrax": lambda x: distrax.Categorical(logits=x).entropy(),
            "torch": lambda x: D.Categorical(logits=x).entropy(),
            "scipy": lambda x: (special.softmax(x, -1) * scipy_surprisal(x)).sum(-1),
        },
    ),
    Task(
        "cross_entropy_with_logits",
        "cross_entropy_with_logits",
        {
            "jce": jce.cross_entropy_with_logits,
            "jax": lambda p, x: (p * surprisal(x)).sum(-1),
            "optax": lambda p, x: optax.softmax_cross_entropy(x, p),
            "torch": lambda p, x: F.cross_entropy(x, p, reduction="none"),
            "scipy": lambda p, x: (p * scipy_surprisal(x)).sum(-1),
        },
    ),
    Task(
        "cross_entropy_with_integer_labels",
        "cross_entropy_with_integer_labels",
        {
            "jce": jce.cross_entropy_with_integer_labels,
            "jax": lambda y, x: of_label(surprisal(x), y),
            "optax": lambda y, x: optax.softmax_cross_entropy_with_integer_labels(x, y),
            "distrax": lambda y, x: -distrax.Categorical(logits=x).log_prob(y),
            "torch": lambda y, x: F.cross_entropy(x, y, reduction="none"),
            "scipy": lambda y, x: np.take_along_axis(scipy_surprisal(x), y[..., None], -1)[..., 0],
        },
        kind="labels",
    ),
    Task(
        "cross_entropy_with_integer_labels",
        "cross_entropy_with_integer_labels-smoothed",
        {
            "jce": label_with(label_smoothing=SMOOTHING),
            "jax": lambda y, x: (1 - SMOOTHING) * of_label(surprisal(x), y) + SMOOTHING * surprisal(x).mean(-1),
            "optax": lambda y, x: optax.softmax_cross_entropy(x, smoothed_labels(y, x)),
            "torch": lambda y, x: F.cross_entropy(x, y, reduction="none", label_smoothing=SMOOTHING),
        },
        kind="labels",
        note="smoothed",
    ),
    Task(
        "cross_entropy_with_integer_labels",
        "cross_entropy_with_integer_labels-z-loss",
        {
            "jce": label_with(z_loss=Z_LOSS),
            "jax": lambda y, x: of_label(surprisal(x), y) + Z_LOSS * jnp.square(jax.nn.logsumexp(x, -1)),
            "optax": lambda y, x: (
                optax.softmax_cross_entropy_with_integer_labels(x, y) + Z_LOSS * jnp.square(jax.nn.logsumexp(x, -1))
            ),
        },
        kind="labels",
        note="z-loss",
    ),
    Task(
        "log_probs_with_integer_labels",
        "log_probs_with_integer_labels-of k labels",
        {
            "jce": lambda y, x: jce.log_probs_with_integer_labels(several(y, x), x)[..., 0],
            "jax": lambda y, x: jnp.take_along_axis(-surprisal(x), several(y, x), -1)[..., 0],
            "scipy": lambda y, x: np.take_along_axis(-scipy_surprisal(x), several(y, x), -1)[..., 0],
        },
        kind="labels",
    ),
    Task(
        "kl_divergence_with_logits",
        "kl_divergence_with_logits",
        {
            "jce": jce.kl_divergence_with_logits,
            "jax": lambda x, y: (jax.nn.softmax(x) * (surprisal(y) - surprisal(x))).sum(-1),
            "optax": lambda x, y: optax.losses.kl_divergence_with_log_targets(-surprisal(y), -surprisal(x)),
            "distrax": lambda x, y: distrax.Categorical(logits=x).kl_divergence(distrax.Categorical(logits=y)),
            "torch": lambda x, y: D.kl_divergence(D.Categorical(logits=x), D.Categorical(logits=y)),
            "scipy": lambda x, y: (special.softmax(x, -1) * (scipy_surprisal(y) - scipy_surprisal(x))).sum(-1),
        },
    ),
    Task(
        "jensen_shannon_divergence_with_logits",
        "jensen_shannon_divergence_with_logits",
        {
            "jce": at_beta(jce.jensen_shannon_divergence_with_logits),
            "jax": lambda x, y: to_mixture_of_logits(jnp, -surprisal(x), -surprisal(y)).sum(-1),
            "torch": lambda x, y: to_mixture_of_logits(torch, F.log_softmax(x, -1), F.log_softmax(y, -1)).sum(-1),
            "scipy": lambda x, y: to_mixture_of_logits(np, -scipy_surprisal(x), -scipy_surprisal(y)).sum(-1),
        },
    ),
    Task(
        "binary_entropy_with_logits",
        "binary_entropy_with_logits",
        {
            "jce": jce.binary_entropy_with_logits,
            "jax": lambda x: jax.nn.softplus(-x) + x * jax.nn.sigmoid(-x),
            "distrax": lambda x: distrax.Bernoulli(logits=x).entropy(),
            "torch": lambda x: D.Bernoulli(logits=x).entropy(),
            "scipy": lambda x: -special.log_expit(x) + x * special.expit(-x),
        },
    ),
    Task(
        "binary_cross_entropy_with_logits",
        "binary_cross_entropy_with_logits",
        {
            "jce": jce.binary_cross_entropy_with_logits,
            "jax": lambda a, x: -a * jax.nn.log_sigmoid(x) - (1 - a) * jax.nn.log_sigmoid(-x),
            "optax": lambda a, x: optax.sigmoid_binary_cross_entropy(x, a),
            "distrax": lambda a, x: distrax.Bernoulli(probs=a).cross_entropy(distrax.Bernoulli(logits=x)),
            "torch": lambda a, x: F.binary_cross_entropy_with_logits(x, a, reduction="none"),
            "scipy": lambda a, x: -a * special.log_expit(x) - (1 - a) * special.log_expit(-x),
        },
    ),
    Task(
        "binary_kl_divergence_with_logits",
        "binary_kl_divergence_with_logits",
        {
            "jce": jce.binary_kl_divergence_with_logits,
            "jax": lambda x, y: (
                jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jax.nn.log_sigmoid(y))
                + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jax.nn.log_sigmoid(-y))
            ),
            "distrax": lambda x, y: distrax.Bernoulli(logits=x).kl_divergence(distrax.Bernoulli(logits=y)),
            "torch": lambda x, y: D.kl_divergence(D.Bernoulli(logits=x), D.Bernoulli(logits=y)),
            "scipy": lambda x, y: (
                special.expit(x) * (special.log_expit(x) - special.log_expit(y))
                + special.expit(-x) * (special.log_expit(-x) - special.log_expit(-y))
            ),
        },
    ),
    Task(
        "sampled_kl_divergence",
        "sampled_kl_divergence",
        {
            "jce": jce.sampled_kl_divergence,
            "jax": lambda a, b: jnp.exp(b - a) - (b - a) - 1,
            "torch": lambda a, b: torch.exp(b - a) - (b - a) - 1,
            "scipy": lambda a, b: special.expm1(b - a) - (b - a),
        },
    ),
    Task(
        "linear_cross_entropy",
        "cross_entropy_with_integer_labels",
        {
            "jce": lambda y, h, w: jce.linear_cross_entropy(y, h, w, reduction="sum"),
            "jax": lambda y, h, w: of_label(surprisal(h @ w.T), y).sum(),
            "optax": lambda y, h, w: optax.softmax_cross_entropy_with_integer_labels(h @ w.T, y).sum(),
            "tokamax": lambda y, h, w: tokamax.linear_softmax_cross_entropy_loss(h, y, w.T, reduction="sum"),
            "jax-cce": lambda y, h, w: len(y) * jax_cce.linear_cross_entropy(h, w, y),
            "torch": lambda y, h, w: F.linear_cross_entropy(h, w, y, reduction="sum"),
        },
        kind="head",
    ),
    Task(
        "linear_log_probs",
        "entropy_with_logits",
        {"jce": lambda y, h, w: jce.linear_log_probs(y, h, w).entropy.sum(), **ENTROPY_OF_A_HEAD},
        kind="head",
    ),
    Task(
        "linear_map",
        "entropy_with_logits",
        {
            "jce": lambda y, h, w: jce.linear_map(jce.entropy_with_logits, jce.Linear(h, w), reduction="sum"),
            **ENTROPY_OF_A_HEAD,
        },
        kind="head",
    ),
    Task(
        "linear_kl_divergence",
        "kl_divergence_with_logits",
        {
            "jce": lambda hp, wp, h, w: jce.linear_kl_divergence(jce.Linear(hp, wp), jce.Linear(h, w), reduction="sum"),
            "jax, scan": kl_of_two_heads,  # a manual loop over chunks of tokens
            "optax": lambda hp, wp, h, w: optax.losses.kl_divergence_with_log_targets(
                -surprisal(h @ w.T), -surprisal(hp @ wp.T)
            ).sum(),
            "torch": lambda hp, wp, h, w: F.kl_div(
                F.log_softmax(h @ w.T, -1), F.log_softmax(hp @ wp.T, -1), reduction="sum", log_target=True
            ),
        },
        kind="two heads",
    ),
]
