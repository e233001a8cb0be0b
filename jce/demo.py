"""Minimizes H(p, q) over q, on real text: `python -m jce.demo [TEXT]`.

The text gives one target p for each letter: how often each of a-z and space follows it. (Many never do.) Each target
has a model q = softmax(θ). θ starts at random values, and an optimizer minimizes H(p, q) over θ. Because
H(p, q) = H(p) + KL(p‖q), the minimum is the entropy H(p), at q = p, and the gap H(p, q) - H(p) is the KL divergence.

The same in Python:

    p, letters = transition_distributions(text)
    for snapshot in fit(p, make_optimizer("lbfgs"), steps=1000):
        print(snapshot.step, snapshot.kl)
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jce
from jce._programs.command_line import Parser, extra, integer, png, run, text_file

PROGRAM = "python -m jce.demo"

with extra(PROGRAM, __name__, "'jce[demo]'"):
    import matplotlib
    import optax
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from tqdm import tqdm


# The targets: next-character frequencies

ALPHABET = "abcdefghijklmnopqrstuvwxyz "


def transition_distributions(text: str) -> tuple[Array, str]:
    """The distributions of the next character: how often each of a-z and space follows each of a-z and space.

    The text is converted to lower case, and each run of other characters becomes one space. A character that nothing
    follows has no distribution, and no row.

    Returns:
      p: [m, 27]. Row i is the distribution of the character after letters[i]. Columns are in the order of `ALPHABET`.
      letters: the m characters that have a row, in the order of `ALPHABET`.

    Raises:
      ValueError: if the text has no letter, or is a single letter.
    """
    text = re.sub("[^a-z]+", " ", text.lower())
    if not text.strip():
        raise ValueError("has no letter from a to z")
    if len(text) < 2:
        raise ValueError("is a single letter, which nothing follows")
    n = len(ALPHABET)
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(int) - ord("a")
    codes[codes < 0] = n - 1  # the space
    counts = np.bincount(n * codes[:-1] + codes[1:], minlength=n * n).reshape(n, n)
    occurs = counts.any(axis=1)
    counts = counts[occurs]
    return jnp.asarray(counts / counts.sum(axis=1, keepdims=True)), "".join(np.array(list(ALPHABET))[occurs])


def default_text() -> str:
    """The documentation that ships with Python, about 400,000 characters of English."""
    from pydoc_data.topics import topics

    return " ".join(topics.values())


# The fit: minimizes H(p, q) over θ, where q = softmax(θ)


def _lbfgs(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """optax's L-BFGS, without the steps that would raise the value.

    Its curvature pairs are differences of float32 gradients. Because of their rounding errors, a direction can go
    uphill, sometimes by whole nats. The line search gives up on such a direction, but still takes a step. This function
    drops that step. A dropped step adds a pair of zeros to the memory of L-BFGS, so that the inaccurate pair leaves the
    memory in time.
    """

    def update(updates, state, params: Any = None, **extra):
        descends = extra["value_fn"](params + updates) <= extra["value"]
        return jnp.where(descends, updates, jnp.zeros_like(updates)), state

    never_uphill = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    return optax.chain(optax.lbfgs(learning_rate), never_uphill)


# Each optimizer has a learning rate that suits any text. For the first two it is 2, because no eigenvalue of
# diag(q) - qqᵀ, the Hessian of H(p, softmax(θ)), exceeds 1/2.
OPTIMIZERS: dict[str, tuple[Callable[[float], optax.GradientTransformation], float]] = {
    "sgd": (optax.sgd, 2.0),
    "nesterov": (functools.partial(optax.sgd, momentum=0.9, nesterov=True), 2.0),
    "adam": (optax.adam, 0.3),
    "lbfgs": (_lbfgs, 1.0),
}


@functools.cache  # the same object for the same arguments, so that `_descend` is compiled once
def make_optimizer(name: str, learning_rate: float | None = None) -> optax.GradientTransformation:
    """The optimizer with this name in `OPTIMIZERS`. It has its default learning rate if you pass none."""
    make, default = OPTIMIZERS[name]
    return make(default if learning_rate is None else learning_rate)


class Snapshot(NamedTuple):
    """The state of a fit: q, means over the rows, and the largest differences over all entries."""

    step: int
    q: Array  # [m, 27]
    entropy: float
    cross_entropy: float
    kl: float
    distance: float  # max |q - p|
    disagreement: float  # max |∇θ H by the chain rule - (q - p)|

    @property
    def perplexity(self) -> float:
        return math.exp(self.cross_entropy)


def fit(p: Array, optimizer: optax.GradientTransformation, steps: int, *, seed: int = 0) -> Iterator[Snapshot]:
    """Minimizes H(p, softmax(θ)) from a random θ, and yields snapshots: at step 0, at some steps, and at the last step.

    It is a generator, so that a caller can show progress, or stop. `list(fit(...))` is the whole history.

    Args:
      p: [m, n], a batch of targets, which are fitted independently.
      optimizer: any optimizer of optax.
      steps: at least 1.
      seed: the seed of the initial θ, which is standard normal.

    Raises:
      FloatingPointError: if the fit diverges, so that H(p, q) is no longer finite.
    """
    theta = jax.random.normal(jax.random.key(seed), p.shape, p.dtype)
    # Some of optax's initial zeros are weakly typed. The loop returns strongly typed arrays, so it would be compiled
    # twice.
    state = jax.tree.map(lambda x: x.astype(x.dtype), jax.vmap(optimizer.init)(theta))
    done = 0
    for mark in _marks(steps):
        theta, state = _descend(p, theta, state, mark - done, optimizer)
        done = mark
        q, *numbers = _measure(p, theta)
        snapshot = Snapshot(mark, q, *map(float, numbers))
        if not math.isfinite(snapshot.kl):
            raise FloatingPointError(f"H(p,q) is {snapshot.cross_entropy} at step {mark}: the fit diverged")
        yield snapshot


def _marks(steps: int) -> list[int]:
    """The steps of the snapshots.

    They are 20 per decade for a curve on log axes, every hundredth of all steps for the progress bar, and those of the
    table.
    """
    curve = np.geomspace(1, steps, 2 + math.floor(20 * math.log10(steps))).round().astype(int).tolist()
    bar = np.linspace(0, steps, 101).astype(int).tolist()
    return sorted({*curve, *bar, *_table_marks(steps)})


def _table_marks(steps: int) -> set[int]:
    """0, 1, 3, 10, 30, 100 … and the last step."""
    return {0, steps} | {c * 10**k for k in range(len(str(steps))) for c in (1, 3) if c * 10**k < steps}


# A loop with a traced bound. A scan would be compiled again for each number of steps between two marks.
@functools.partial(jax.jit, static_argnames="optimizer")
def _descend(p, theta, state, steps, optimizer):
    update = optax.with_extra_args_support(optimizer).update

    def step(p, theta, state):
        def loss(theta):
            return jce.cross_entropy(p, jax.nn.softmax(theta))

        def gap(theta):
            return jce.generalized_kl_divergence(p, jax.nn.softmax(theta))

        grad = jax.grad(loss)(theta)
        # The line search of L-BFGS compares values. Near the minimum, H(p, q) is within an ulp of H(p), so steps no
        # longer change it. KL(p‖q) differs from H(p, q) by a constant, and stays accurate.
        direction, state = update(grad, state, theta, value=gap(theta), grad=grad, value_fn=gap)
        return optax.apply_updates(theta, direction), state

    return lax.fori_loop(0, steps, lambda _, carry: jax.vmap(step)(p, *carry), (theta, state))


@jax.jit
def _measure(p, theta):
    q, h, h_pq, kl, distance, disagreement = jax.vmap(_measure_one)(p, theta)
    return q, h.mean(), h_pq.mean(), kl.mean(), distance.max(), disagreement.max()


def _measure_one(p, theta):
    q = jax.nn.softmax(theta)
    distance, disagreement = jnp.abs(q - p), jnp.abs(chain_rule_gradient(p, theta) - (q - p))
    # The generalized form equals KL, since p and q both sum to 1, and rounding can't make it negative.
    kl = jce.generalized_kl_divergence(p, q)
    return q, jce.entropy(p), jce.cross_entropy(p, q), kl, distance.max(), disagreement.max()


def chain_rule_gradient(p: Array, theta: Array) -> Array:
    """∇θ H(p, q) by the chain rule: -p/q times the Jacobian of q = softmax(θ).

    The closed form, q - p, doesn't divide by q.
    """
    q, times_jacobian = jax.vjp(jax.nn.softmax, theta)
    return times_jacobian(jax.grad(jce.cross_entropy, argnums=1)(p, q))[0]


# The picture

# Okabe and Ito's colors, which can be told apart with every kind of color vision. Strokes tell the lines apart without
# color.
LINES = {"sgd": ("#CC79A7", ":"), "nesterov": ("#009E73", "-."), "adam": ("#0072B2", "--"), "lbfgs": ("#D55E00", "-")}


@matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.labelsize": 16, "figure.titlesize": 23})
def picture(p: Array, letters: str, histories: dict[str, list[Snapshot]], name: str) -> Figure:
    """Heat maps of p and q for the optimizer `name`, and the gaps of all optimizers by step."""
    history = histories[name]
    midway = next((s for s in history if s.kl < history[0].kl / 5), history[-1])
    stages = {"start": history[0], "midway": midway, "end": history[-1]}
    maps = {f"q, {when}: step {s.step}, gap {s.kl:.2g}": s.q for when, s in stages.items()}
    figure = Figure(figsize=(18, 11), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    figure.suptitle("min H(p, q) over q = softmax(θ):  q learns what follows each character of the text")
    left, right = figure.add_gridspec(1, 2, width_ratios=(1.95, 1), wspace=0.06)
    _draw_heat_maps(figure, left, letters, {"p, the target": p} | maps)
    _draw_gaps(figure.add_subplot(right), histories, name, stages)
    return figure


def _draw_heat_maps(figure: Figure, place: SubplotSpec, letters: str, maps: dict[str, Array]) -> None:
    norm = PowerNorm(0.5, 0, 1)  # square-root scale: otherwise rare letters wouldn't be visible
    panels = list(place.subgridspec(2, 2).subplots(squeeze=False).flat)
    for axes, (title, x) in zip(panels, maps.items(), strict=True):
        axes.imshow(x, norm=norm, cmap="viridis", aspect="auto")
        axes.set_title(title)
        axes.set_xticks(range(len(ALPHABET)), ALPHABET.replace(" ", "␣"), fontsize=13)
        axes.set_yticks(range(len(letters)), letters.replace(" ", "␣"), fontsize=12)
        axes.tick_params(length=0)
    for axes in panels[2:]:
        axes.set_xlabel("next character")
    for axes in panels[::2]:
        axes.set_ylabel("character")
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    label = "probability (square-root scale)"
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=panels, ticks=ticks, format="{x:g}", aspect=40, label=label)


def _draw_gaps(axes: Axes, histories: dict[str, list[Snapshot]], name: str, stages: dict[str, Snapshot]) -> None:
    for key, (colour, stroke) in LINES.items():
        steps, gaps = zip(*((s.step, s.kl) for s in histories[key] if s.step), strict=True)
        label = f"{key}, {gaps[-1]:.0e}"
        axes.plot(steps, gaps, stroke, color=colour, linewidth=4, marker="o", markevery=[-1], label=label)
    for step, (when, gap) in {s.step: (when, s.kl) for when, s in stages.items() if s.step}.items():
        axes.plot(step, gap, "o", color=LINES[name][0], markersize=13, markeredgecolor="black", clip_on=False)
        axes.annotate(when, (step, gap), (-6, -24), textcoords="offset points", ha="right")
    axes.set(xscale="log", yscale="log")
    axes.set(title="the gap, for four optimizers", xlabel="step", ylabel="H(p, q) − H(p) = KL(p‖q),  nats")
    axes.margins(y=0.08)
    axes.grid(color="0.88")
    axes.legend(loc="lower left", title="the gap at the end", alignment="left", handlelength=3)
    axes.spines[["top", "right"]].set_visible(False)


# The command line


def _parser() -> argparse.ArgumentParser:
    rates = ", ".join(f"{rate:g} for {name}" for name, (_, rate) in OPTIMIZERS.items())
    claim = "Minimize H(p,q) over q = softmax(theta), where p holds the next-character frequencies of a text."
    parser = Parser(prog=PROGRAM, description=claim, add_help=False)
    add = parser.add_argument
    add(
        "text",
        metavar="TEXT",
        nargs="?",
        type=_distributions,
        help="A UTF-8 file (default: Python's own documentation).",
    )
    add("--optimizer", choices=OPTIMIZERS, default="lbfgs", help="The optimizer (default: %(default)s).")
    add("--learning-rate", type=_rate, metavar="RATE", help=f"Its learning rate (default: {rates}).")
    add("--steps", type=integer(1, 10**9), default=1000, help="The number of steps (default: %(default)s).")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="The seed for the initial theta (default: %(default)s).")
    add("--out", type=png, default="demo.png", metavar="FILE.png", help="The picture to write (default: %(default)s).")
    add("-h", "--help", action="help", help="Show this and exit.")
    return parser


def _distributions(name: str) -> tuple[Array, str]:
    text = text_file(name)
    try:
        return transition_distributions(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name!r} {error if text else 'is empty'}") from None


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive finite number, not {text!r}")
    return rate


HEADER = f"{'step':>9} {'H(p)':>9} {'H(p,q)':>9} {'KL':>9} {'perplexity':>11} {'max|q-p|':>9}"


def _row(s: Snapshot) -> str:
    return f"{s.step:9} {s.entropy:9.6f} {s.cross_entropy:9.6f} {s.kl:9.2e} {s.perplexity:11.6f} {s.distance:9.2e}"


def _watch(p: Array, name: str, rate: float, steps: int, seed: int, rows: Container[int] = ()) -> list[Snapshot]:
    """Fits q to p, and returns the history. Shows a progress bar, and a line of the table at each step in `rows`."""
    history = []
    with tqdm(total=steps, desc=f"{name:8}", unit=" steps", leave=False, disable=None, dynamic_ncols=True) as bar:
        for s in fit(p, make_optimizer(name, rate), steps, seed=seed):
            bar.set_postfix_str(f"H(p,q) {s.cross_entropy:.6f}, H(p) {s.entropy:.6f}, gap {s.kl:.1e}", refresh=False)
            bar.update(s.step - bar.n)
            if s.step in rows:
                bar.write(_row(s))
            history.append(s)
    return history


def _run(args: argparse.Namespace) -> None:
    p, letters = args.text or transition_distributions(default_text())
    chosen, rates = args.optimizer, {name: rate for name, (_, rate) in OPTIMIZERS.items()}
    rates[chosen] = args.learning_rate or rates[chosen]
    zeros = int((p == 0).sum())
    print(f"p: the next-character frequencies, {len(letters)} x {len(ALPHABET)}, {zeros} of them exactly 0")
    print(f"q: softmax(theta), by {chosen} with learning rate {rates[chosen]:g} from seed {args.seed}")
    print(f"H(p), H(p,q) and KL: means over the rows, in nats; perplexity: exp H(p,q)\n\n{HEADER}")
    history = _watch(p, chosen, rates[chosen], args.steps, args.seed, _table_marks(args.steps))
    largest = max(s.disagreement for s in history)
    print("\ngradient of H(p,q) with respect to theta, by the chain rule (-p/q times the Jacobian of the softmax)")
    print(f"and in closed form (q - p): largest difference {largest:.1e}")
    others = {name: _watch(p, name, rates[name], args.steps, args.seed) for name in OPTIMIZERS if name != chosen}
    print(
        f"KL by the other optimizers after {args.steps} steps:"
        f" {', '.join(f'{k} {h[-1].kl:.2e}' for k, h in others.items())}"
    )
    picture(p, letters, others | {chosen: history}, chosen).savefig(args.out)
    print(f"picture: {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. The exit status is 2 for wrong input, 1 if the fit diverges, and 130 if it is interrupted."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except FloatingPointError as error:
        print(f"{PROGRAM}: {error}; choose a smaller --learning-rate", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
