"""Draws the README's first picture: `python -m bench.overview`. It takes two minutes.

Left: the cost of a train step like the README's on this machine, by the number of classes, with jce's loss and with
optax's. Right: the loss of a label in both libraries, as the model becomes more confident.
"""

from __future__ import annotations

import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import jce
from bench.results import FOLDER
from jce._programs.command_line import Parser, png, run

CLASSES = (4096, 16_384, 65_536, 131_072)
BATCH, LENGTH, WIDTH = 8, 256, 256
STYLES = {"jce": ("#D55E00", "-", "o"), "optax": ("#0072B2", "--", "s")}  # colors by Okabe and Ito


class Cost(NamedTuple):
    """The cost of a step. The memory does not include parameters, optimizer state and words."""

    megabytes: float
    seconds: float


def loss(library: str, params: dict[str, jax.Array], words: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of a model with one hidden layer. Its embedding table is also its head."""
    hidden = jax.nn.gelu(params["table"][words] @ params["dense"])
    if library == "jce":
        return jce.linear_cross_entropy(labels, hidden, params["table"])
    logits = hidden @ params["table"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def costs(classes: int, steps: int = 5) -> dict[str, Cost]:
    """The costs of a step with each library. The libraries take turns, and the time is the least of several steps."""
    optimizer, keys = optax.adamw(3e-3), jax.random.split(jax.random.key(0), 3)
    text = jax.random.randint(keys[0], (BATCH, LENGTH + 1), 0, classes)
    params = {
        "table": jax.random.normal(keys[1], (classes, WIDTH)) / WIDTH**0.5,
        "dense": jax.random.normal(keys[2], (WIDTH, WIDTH)) / WIDTH**0.5,
    }

    @functools.partial(jax.jit, static_argnames="library", donate_argnames=("params", "state"))
    def step(library, params, state, words, labels):
        value, gradient = jax.value_and_grad(functools.partial(loss, library))(params, words, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    programs: dict[str, Any] = {}
    runs, seconds, memory = {}, {name: [] for name in STYLES}, {}
    for name in STYLES:
        arguments = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
        programs[name] = step.lower(name, *arguments, text[:, :-1], text[:, 1:]).compile()
        memory[name] = programs[name].memory_analysis().temp_size_in_bytes / 1e6
        runs[name] = arguments
    for _ in range(steps + 1):  # the first step is a warm-up
        for name, program in programs.items():
            start = time.perf_counter()
            *runs[name], _ = jax.block_until_ready(program(*runs[name], text[:, :-1], text[:, 1:]))
            seconds[name].append(time.perf_counter() - start)
    return {name: Cost(memory[name], min(times[1:])) for name, times in seconds.items()}


def surprisals(margins: np.ndarray) -> dict[str, np.ndarray]:
    """By library, float32 losses of a label whose logit is above the logits of two other classes by these margins."""
    logits = jnp.pad(jnp.asarray(margins, jnp.float32)[:, None], ((0, 0), (0, 2)))
    labels = jnp.zeros(len(margins), jnp.int32)
    losses = jce.cross_entropy_with_integer_labels, optax.softmax_cross_entropy_with_integer_labels
    return {"jce": np.asarray(losses[0](labels, logits)), "optax": np.asarray(losses[1](logits, labels))}


def picture(of_step: dict[int, dict[str, Cost]], margins: np.ndarray, losses: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(18, 8), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 2)
    memory, seconds = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    right, places = figure.add_subplot(grid[:, 1]), range(len(of_step))
    for name, (colour, stroke, mark) in STYLES.items():
        look = {"color": colour, "linestyle": stroke, "linewidth": 4, "markersize": 11, "label": name}
        memory.plot(places, [c[name].megabytes / 1e3 for c in of_step.values()], marker=mark, **look)
        seconds.plot(places, [c[name].seconds for c in of_step.values()], marker=mark, **look)
        right.plot(margins, np.where(losses[name] > 0, losses[name], np.nan), **look)
    # The first margin at which the loss is 0, and the smallest loss before it.
    gone, least = margins[losses["optax"] == 0].min(), losses["optax"][losses["optax"] > 0].min()
    arrow = {"arrowstyle": "->", "linewidth": 1.5}
    note = f"optax's loss is 0\nfrom {gone:.4g} on"
    right.annotate(note, (gone, least), (0.4, 0.72), textcoords="axes fraction", arrowprops=arrow)
    memory.set(title="temporary memory of a train step, GB")
    memory.legend(handlelength=3, title=f"{BATCH * LENGTH:,} tokens × {WIDTH}, float32, AdamW")
    seconds.set(title="its time on two CPU cores, seconds", xlabel="classes")
    right.set(title="loss in nats, as the model becomes more confident", yscale="log")
    right.set_xlabel("label's logit minus the others")
    right.legend(handlelength=3, title="one row of 3 classes, float32")
    for axes in (memory, seconds):
        axes.set_ylim(0)
        axes.set_xticks(places, [f"{n:,}" for n in of_step])
    for axes in (memory, seconds, right):
        axes.grid(color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.labelsize": 16, "legend.title_fontsize": 15})
def main() -> None:
    parser = Parser(prog="python -m bench.overview", description="Draw the README's first picture.")
    default = pathlib.Path(FOLDER) / "overview-cpu.png"
    parser.add_argument("--out", type=png, default=str(default), help="The picture (default: %(default)s).")
    args = parser.parse_args()
    of_step = {}
    print(f"{'classes':>10}{'jce':>12}{'optax':>12} MB{'jce':>12}{'optax':>12} s")
    for n in CLASSES:
        of_step[n] = costs(n)
        columns = "".join(f"{c.megabytes:12.0f}" for c in of_step[n].values())
        print(f"{n:10,}{columns}   {''.join(f'{c.seconds:12.3f}' for c in of_step[n].values())}")
    margins = np.linspace(0, 80, 321)
    picture(of_step, margins, surprisals(margins)).savefig(args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    run(main)
