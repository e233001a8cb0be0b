"""Trains towards the largest margin with three losses: `python -m notebooks.examples.max_margin`.

This is softmax regression on scikit-learn's digits by normalized gradient descent, W ← W - η g/‖g‖, where g is the
gradient of the mean loss. The digits are linearly separable. So the loss falls to 0, W grows without bound, and the
direction of W converges to that of the separator with the largest margin

    min over the images of (x_y - max of the other xᵢ) / ‖W‖        (Soudry et al., JMLR 19, 2018)

The few images nearest to the separator determine this direction. Their losses are near exp(-margin · ‖W‖). The
textbook formula log Σ exp xᵢ - x_y rounds such losses to 0. It also rounds the gradient's entry at the label, q_y - 1,
to 0, but not the other entries, qᵢ, so the gradient has a wrong direction. With jce's loss, training in float32 follows
training in float64, until the gradient falls below the range of float32, near step 125,000.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jce
from jce._programs.command_line import Parser, extra, integer, png, run

PROGRAM = "python -m notebooks.examples.max_margin"

with extra(PROGRAM, __name__, "-e '.[notebooks]'"):
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.svm import LinearSVC
    from tqdm import tqdm


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The features, [1797, 65] (pixels from 0 to 1, and a constant 1), and the labels, [1797], from 0 to 9."""
    pixels, labels = load_digits(return_X_y=True)
    return np.c_[pixels / 16, np.ones(len(pixels))], labels.astype(np.int32)


def largest_margin() -> float:
    """The largest margin, by a support vector machine.

    It is 1/‖W‖ for the smallest W with which each x_y is at least 1 larger than the other xᵢ.
    """
    machine = LinearSVC(multi_class="crammer_singer", C=1e4, fit_intercept=False, tol=1e-6, max_iter=100_000)
    return float(1 / np.linalg.norm(machine.fit(*digits()).coef_))


def textbook(labels: Array, logits: Array) -> Array:
    """log Σ exp xᵢ - x_y, evaluated as written."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


# Okabe and Ito's colors, which can be told apart with every kind of color vision. Strokes tell the lines apart without
# color.
CURVES: dict[str, tuple[Callable[[Array, Array], Array], Any, str, str]] = {
    "textbook, float32": (textbook, np.float32, "#CC79A7", ":"),
    "textbook, float64": (textbook, np.float64, "#0072B2", "--"),
    "jce, float32": (jce.cross_entropy_with_integer_labels, np.float32, "#D55E00", "-"),
}
TABLE = (100, 1000, 10_000, 20_000, 44_000, 60_000, 100_000)


class Snapshot(NamedTuple):
    """The state of the descent."""

    step: int
    margin: float
    loss: float  # the mean, as computed by the loss function that is trained


def train(loss: Callable[[Array, Array], Array], dtype: Any, steps: int) -> Iterator[Snapshot]:
    """Minimizes the mean of loss(labels, logits), starting from W = 0. Yields a snapshot at each of `_marks(steps)`."""
    features, y = digits()
    h, w, done = features.astype(dtype), np.zeros((features.shape[1], 10), dtype), 0
    for mark in _marks(steps):
        with jax.enable_x64(h.dtype == np.float64):  # not around the yield: it would apply to the caller's code
            w, margin, mean = _descend(w, h, y, mark - done, loss)
            done, snapshot = mark, Snapshot(mark, float(margin), float(mean))
        yield snapshot


def _marks(steps: int) -> list[int]:
    """The steps of the snapshots: after each 250th of all steps for the curves, and those of the table."""
    return sorted(k for k in {*np.linspace(0, steps, 251).astype(int).tolist(), *TABLE} if 0 < k <= steps)


# A loop with a traced bound. A scan would be compiled again for each number of steps between two marks.
@functools.partial(jax.jit, static_argnames="loss")
def _descend(w, h, y, steps, loss):
    logits = functools.partial(jnp.matmul, h, precision="highest")  # by default, some devices round float32
    gradient = jax.grad(lambda w: loss(y, logits(w)).mean())
    w = lax.fori_loop(0, steps, lambda _, w: w - 0.5 * normalized(gradient(w)), w)
    x, is_label = logits(w), jax.nn.one_hot(y, 10, dtype=bool)
    margins = x.max(1, where=is_label, initial=-jnp.inf) - x.max(1, where=~is_label, initial=-jnp.inf)
    return w, margins.min() / jnp.linalg.norm(w), loss(y, x).mean()


def normalized(g: Array) -> Array:
    """g/‖g‖. Scales g before squaring it: in float32, the square of a number below 1e-19 is subnormal or 0."""
    g = g / jnp.abs(g).max()
    return g / jnp.linalg.norm(g)


@matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.labelsize": 16, "figure.titlesize": 23})
def picture(histories: dict[str, list[Snapshot]]) -> Figure:
    """The margins and the losses of `CURVES` by step."""
    figure = Figure(figsize=(18, 8), dpi=100, layout="constrained")
    figure.suptitle("The digits by normalized gradient descent: which loss goes to the largest margin?")
    left, right = figure.subplots(1, 2)
    for name, history in histories.items():
        steps, margins, losses = zip(*history, strict=True)
        *_, colour, stroke = CURVES[name]
        left.plot(steps, margins, stroke, color=colour, linewidth=4, label=name)
        right.plot(steps, losses, stroke, color=colour, linewidth=4, label=name)
    largest, low = largest_margin(), 0 if left.get_ylim()[1] > 0 else None  # margins are negative in a short run
    left.axhline(largest, color="black", linewidth=1.5)
    left.annotate("the largest possible margin", (0, largest), (0, 5), textcoords="offset points")
    left.set(title="margin", ylabel="min (x_y − max of the other x) / ‖W‖", ylim=(low, 1.1 * largest))
    right.set(title="mean loss, as computed: 0 where a curve drops", ylabel="nats", yscale="log")
    right.legend(handlelength=3)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Trains with each loss, prints a table and writes the picture.

    The exit status is 2 for wrong input, and 130 after Ctrl-C.
    """
    parser = Parser(prog=PROGRAM, description="Train on the digits towards the largest margin, with three losses.")
    parser.add_argument(
        "--steps", type=integer(1, 10**9), default=100_000, help="The number of steps (default: %(default)s)."
    )
    parser.add_argument(
        "--out", type=png, default="max_margin.png", help="The picture to write (default: %(default)s)."
    )
    args = parser.parse_args(argv)
    print(f"Normalized gradient descent on scikit-learn's digits: {args.steps:,} steps, with three losses\n")
    histories = {}
    for name, (loss, dtype, *_) in CURVES.items():
        snapshots, blocks = train(loss, dtype, args.steps), len(_marks(args.steps))
        histories[name] = list(
            tqdm(snapshots, name, blocks, leave=False, disable=None, unit=" blocks", dynamic_ncols=True)
        )
    print(f"{'':8}" + "".join(f"{name:>24}" for name in histories))
    print(f"{'step':>8}" + f"{'margin':>13}{'loss':>11}" * len(histories))
    for row in zip(*histories.values(), strict=True):
        if row[0].step in {*TABLE, args.steps}:
            print(f"{row[0].step:8}" + "".join(f"{s.margin:13.6f}{s.loss:11.2e}" for s in row))
    picture(histories).savefig(args.out)
    print(f"\nlargest margin: {largest_margin():.6f}\npicture: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
