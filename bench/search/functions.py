"""The functions that are searched: those in the tests' table, and some that have no row in it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jce
from bench.search.scales import HVP
from tests.kernels import LOGIT, ROWS, SMOOTHING, TABLE, Z_LOSS, Kernel, formulas, label

FEW, MANY = (2, 3, 5, 16), 1000
# The lengths of rows that are stored as recipes. On a CPU jce sums rows of more than 32,768 classes in blocks.
LONG = (MANY, 4_096, 32_768, 50_257, 128_256, 262_144)
WHOLE, IN_BLOCKS = "long rows", "longer rows"
VALUE = "value"

# The bars (bounds): how many ulps a function may be off at the worst known arguments, in its value, its first
# derivatives and its second derivatives. They are defined only here, by the function's name or the kind of its
# arguments.
BARS = {
    "elementwise": (7, 6, 6),
    "binary_kl_divergence_with_logits": (8, 7, 7),
    "rows": (8, 8, 13),
    "kl_divergence": (10, 10, 12),
    "generalized_kl_divergence": (10, 10, 12),
    "kl_divergence_with_logits": (10, 10, 12),
    "jensen_shannon_divergence": (12, 12, 12),
    "jensen_shannon_divergence_with_logits": (12, 12, 12),
    # Rounding each logit's difference from the largest logit changes a comparison of two rows. The search allows for
    # this, but for less than the largest possible effect.
    "kl_divergence_with_logits, off the grid": (10, 14, 14),
    "jensen_shannon_divergence_with_logits, off the grid": (13, 18, 18),
    # A derivative of the tail is the product of two softmaxes.
    "log_probs_with_integer_labels, tail": (8, 14, 14),
    # With sums in float64 a derivative would need 4, but a loss would take 1.2 times as long on a CPU.
    "1,000 classes": (6, 12, 20),
    # Long rows may hold thousands of equal terms. In their sum each addition may round in the same direction.
    WHOLE: (15, 18),
    IN_BLOCKS: (28, 42),
    f"log_probs_with_integer_labels, tail, {WHOLE}": (15, 25),
    f"log_probs_with_integer_labels, tail, {IN_BLOCKS}": (36, 72),
}
OTHERS = 1.25  # the bar's factor when rows are summed as on accelerators


def structured(classes: int) -> str:
    """The kind of arguments, as written in a result line."""
    return f"{classes:,} classes, structured"


LONG_ROWS = {structured(n): WHOLE if n <= 32_768 else IN_BLOCKS for n in LONG}  # kind of arguments: key in BARS


@dataclass(frozen=True, eq=False)
class Searched:
    """A row of the table, and its searches: second derivatives if `hvp`, 1,000 classes if `many`, and the row
    lengths in `LONG` if `long`."""

    kernel: Kernel
    hvp: bool = False
    many: bool = False
    long: bool = False
    value_only: bool = False

    @property
    def key(self) -> str:
        return label(self.kernel)

    @property
    def label(self) -> str:
        return f"{self.kernel.name}, {self.kernel.note}" if self.kernel.note else self.kernel.name

    @property
    def one_number(self) -> bool:
        return not self.kernel.has_classes and len(self.kernel.arguments) == 1

    @property
    def of_logits(self) -> bool:
        return self.kernel.has_classes and LOGIT in self.kernel.domains

    @property
    def in_long_rows(self) -> Searched:
        """The same function without second derivatives, and with labels that aren't constants of the program."""
        function = self.kernel.function
        if self.key in WITH_LABELS:
            function = functools.wraps(function)(WITH_LABELS[self.key])
        return dataclasses.replace(self, kernel=dataclasses.replace(self.kernel, function=function), hvp=False)

    @property
    def quantities(self) -> list[str]:
        names = self.kernel.arguments
        first = [] if self.value_only else [f"∂{name}" for name in names]
        return [VALUE, *first, *([f"{HVP}, {name}" for name in names] if self.hvp else [])]

    def bar(self, quantity: str, arguments: str, on_cpu: bool = True) -> float:
        """The largest allowed error in ulps. Larger for accelerators' sums: this CPU adds their numbers one by one."""
        kind = "rows" if self.kernel.has_classes else "elementwise"
        name, rows = self.kernel.name, LONG_ROWS.get(arguments, arguments)
        names = (f"{self.label}, {rows}", rows, f"{name}, {rows}", self.label, name)
        kind = next((name for name in names if name in BARS), kind)
        bar = BARS[kind][0 if quantity == VALUE else 2 if quantity.startswith(HVP) else 1]
        return bar if on_cpu else OTHERS * bar


# Functions without a row in the table


def at_half(formula: Callable) -> Callable:
    """The Jensen-Shannon divergence with beta 1/2: the mean of the two KL divergences to the middle distribution."""

    def divergence(x, y):
        p, q = formula(x), formula(y)
        middle = [(pi + qi) / 2 for pi, qi in zip(p, q, strict=True)]
        return (formulas.kl_divergence(p, middle) + formulas.kl_divergence(q, middle)) / 2

    return divergence


def entropy_of_head(x):
    """The entropy from linear_log_probs. The head is the identity, so the logits are the hidden states x."""
    return jce.linear_log_probs(jnp.zeros(len(x), int), x, jnp.eye(x.shape[-1], dtype=x.dtype)).entropy


def loss_of_head(x):
    head = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jce.linear_cross_entropy(jnp.zeros(len(x), int), x, head, reduction="none")


@functools.wraps(jce.cross_entropy_with_integer_labels)
def derivative_in_smoothing(x):
    def loss(smoothing):
        labels = jnp.zeros(len(x), int)
        return jce.cross_entropy_with_integer_labels(labels, x, label_smoothing=smoothing)

    return jax.jvp(loss, (jnp.asarray(SMOOTHING, x.dtype),), (jnp.ones((), x.dtype),))[1]


def zeros(x):
    """Labels 0 that depend on the logits. So they aren't constants of the program, just as a user's labels aren't."""
    return jnp.isnan(x[..., 0]).astype(jnp.int32)


def of_label(**options):
    return lambda x: jce.cross_entropy_with_integer_labels(zeros(x), x, **options)


def of_labels(entry: int, *labels: int, **options):
    def log_prob(x):
        several = jnp.stack([zeros(x) + label for label in labels], axis=-1)
        return jce.log_probs_with_integer_labels(several, x, **options)[..., entry]

    return log_prob


LABELS, LOG_PROBS = "cross_entropy_with_integer_labels", "log_probs_with_integer_labels"
# Used in long rows, for those functions whose labels are constants in the table
WITH_LABELS = {
    LABELS: of_label(),
    f"{LABELS}-smoothed": of_label(label_smoothing=SMOOTHING),
    f"{LABELS}-z-loss": of_label(z_loss=Z_LOSS),
    f"{LOG_PROBS}-of k labels": of_labels(0, 0, 0, 1),
    f"{LOG_PROBS}-tail": of_labels(-1, 0, tail=True),
}
JENSEN_SHANNON = "jensen_shannon_divergence"
MORE = [
    dataclasses.replace(
        ROWS[JENSEN_SHANNON], function=jce.jensen_shannon_divergence, note="beta 1/2", formula=at_half(list)
    ),
    dataclasses.replace(
        ROWS[f"{JENSEN_SHANNON}_with_logits"],
        function=jce.jensen_shannon_divergence_with_logits,
        note="beta 1/2",
        formula=at_half(formulas.softmax),
        gradient_scale=(
            lambda x, y: formulas.jensen_shannon_gradient_scale(x, y, 0.5),
            lambda x, y: formulas.jensen_shannon_gradient_scale(y, x, 0.5),
        ),
    ),
    dataclasses.replace(
        ROWS["entropy_with_logits"],
        function=functools.wraps(jce.linear_log_probs)(entropy_of_head),
        note="entropy",
    ),
    dataclasses.replace(ROWS[LABELS], function=functools.wraps(jce.linear_cross_entropy)(loss_of_head)),
    dataclasses.replace(
        ROWS[f"{LABELS}-smoothed"],
        function=derivative_in_smoothing,
        note="∂label_smoothing",
        formula=lambda x: x[0] - sum(x) / len(x),
        value_scale=lambda x: max(x) - min(x),
    ),
]
OF_SECOND_ORDER = {LABELS, "cross_entropy_with_logits", "kl_divergence_with_logits", "entropy_with_logits"} | {
    "binary_cross_entropy_with_logits"
}
OF_MANY = {LABELS, f"{LOG_PROBS}-of k labels"}
ALL = [
    Searched(
        kernel,
        hvp=label(kernel) in OF_SECOND_ORDER,
        many=label(kernel) in OF_MANY,
        long=kernel in TABLE and kernel.has_classes,
        value_only=kernel.note == "∂label_smoothing",
    )
    for kernel in [*TABLE, *MORE]
]
