"""A wide next-word model teaches narrow ones: `python -m notebooks.examples.distill [TEXT]`.

The teacher is the model in next_word.py. Three students, with a quarter of its width, see the same batches. They differ
in their loss, by name:

    every word: KL(teacher‖student) over the whole vocabulary, with `jce.linear_kl_divergence`.
    16 words and the text: the mean of two losses, with `jce.linear_map`. One is the KL divergence over 17 classes:
        the teacher's top-16 words, and one class for all other words. The teacher's log-probabilities of the 17
        classes are stored for each place in the text (`jce.log_probs_with_integer_labels` with `tail`). The other
        loss is the cross-entropy of the next word.
    the text: the cross-entropy of the next word, as for the teacher.

The logits of a batch never all exist at once, neither the teacher's nor the student's. The program compares the
memory and time with those of the same losses, computed from all logits at once. Distillation: Hinton, Vinyals and Dean
(2015), arXiv:1503.02531.

The same in Python:

    corpus = read(text)
    *_, trained = train(corpus, 300)
    for snapshot in lesson(corpus, "every word", trained.model, steps=300):
        print(snapshot.step, snapshot.perplexity)
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jce
from jce._programs.command_line import extra, png, run

PROGRAM = "python -m notebooks.examples.distill"

with extra(PROGRAM, __name__, "-e '.[notebooks]'"):
    import matplotlib
    import optax
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from jce.demo import default_text

    from . import next_word
    from .next_word import BATCH, CHUNK, WIDTH, Corpus, Model, Snapshot, hidden_states, read, train, training_parser

STUDENT = WIDTH // 4
KEPT = 16  # the number of the teacher's top-k words that are stored for each place


# The three losses of a batch: in chunks, and from all logits at once, as they are usually written


def linear(model: Model, text: Array, places: Array) -> jce.Linear:
    """Stands for the logits at these places. The matmul with the head is not done yet."""
    return jce.Linear(hidden_states(model, text, places), model.head, model.bias)


def whole(model: Model, text: Array, places: Array) -> Array:
    """log q for every word of the vocabulary at these places, [tokens, n]."""
    return jax.nn.log_softmax(hidden_states(model, text, places) @ model.head.T + model.bias[None])


def every_word(student: Model, text: Array, places: Array, teacher: Model) -> Array:
    p, q = linear(teacher, text, places), linear(student, text, places)
    return jce.linear_kl_divergence(p, q, chunk_size=CHUNK)


def every_word_whole(student: Model, text: Array, places: Array, teacher: Model) -> Array:
    log_p, log_q = whole(teacher, text, places), whole(student, text, places)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()


def kept_words(student: Model, text: Array, places: Array, words: Array, log_p: Array) -> Array:
    x = linear(student, text, places)
    return jce.linear_map(of_word, text[places], words[places], log_p[places], x, reduction="mean", chunk_size=CHUNK)


def of_word(y: Array, words: Array, log_p: Array, x: Array) -> Array:
    """The mean of two losses for one token: a cross-entropy and a KL divergence.

    The cross-entropy is that of the next word y. The KL divergence is over KEPT + 1 classes: `words`, and all other
    words together. log_p has the teacher's log-probabilities of these classes.
    """
    log_q = jce.log_probs_with_integer_labels(words, x, tail=True)
    return (jce.cross_entropy_with_integer_labels(y, x) + jce.kl_divergence_with_logits(log_p, log_q)) / 2


def kept_words_whole(student: Model, text: Array, places: Array, words: Array, log_p: Array) -> Array:
    words, log_p, log_q = words[places], log_p[places], whole(student, text, places)
    of_text = -jnp.take_along_axis(log_q, text[places][:, None], 1).mean()
    is_kept = jnp.zeros(log_q.shape, bool).at[jnp.arange(len(words))[:, None], words].set(True)
    log_rest = jax.nn.logsumexp(jnp.where(is_kept, -jnp.inf, log_q), 1, keepdims=True)
    log_q = jnp.concatenate([jnp.take_along_axis(log_q, words, 1), log_rest], 1)
    return (of_text + optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()) / 2


def text_whole(student: Model, text: Array, places: Array) -> Array:
    return -jnp.take_along_axis(whole(student, text, places), text[places][:, None], 1).mean()


@jax.jit
def top_words(teacher: Model, text: Array) -> tuple[Array, Array]:
    """The teacher's top-k words at each place in the text, and their log-probabilities.

    The words are [length, KEPT]. The log-probabilities are [length, KEPT + 1]: the last one is that of all other words
    together.
    """

    def kept(x):
        words = lax.top_k(x, KEPT)[1]
        return words, jce.log_probs_with_integer_labels(words, x, tail=True)

    return jce.linear_map(kept, linear(teacher, text, jnp.arange(text.size)), chunk_size=CHUNK)


class Lesson(NamedTuple):
    """A student's loss in two forms, the additional arguments of the loss, and its line style in the picture."""

    in_chunks: Callable[..., Array]  # (student, text, places, *given) -> loss
    of_whole_logits: Callable[..., Array]  # the same
    given: Callable[[Model, Array], Sequence[Any]]  # (teacher, text) -> the additional arguments
    colour: str  # one of Okabe and Ito's, which can be told apart with every kind of color vision
    stroke: str  # tells the lines apart without color


LESSONS = {
    "every word": Lesson(every_word, every_word_whole, lambda teacher, _: (teacher,), "#D55E00", "-"),
    "16 words and the text": Lesson(kept_words, kept_words_whole, top_words, "#0072B2", "--"),
    "the text": Lesson(next_word.loss, text_whole, lambda *_: (), "#CC79A7", ":"),
}


def lesson(corpus: Corpus, name: str, teacher: Model, steps: int, *, seed: int = 0) -> Iterator[Snapshot]:
    """Trains a student with one of LESSONS. Yields a snapshot at the start, and up to 20 at equal intervals."""
    objective, _, given, *_ = LESSONS[name]
    return train(corpus, steps, seed=seed, width=STUDENT, objective=objective, given=given(teacher, corpus.text))


distance = jax.jit(every_word)


# The cost


class Cost(NamedTuple):
    """The cost of value and gradient for a batch, without the optimizer."""

    megabytes: float  # of temporary memory, beyond arguments and results
    milliseconds: float


def costs(corpus: Corpus, name: str, teacher: Model, rounds: int = 7) -> tuple[Cost, Cost]:
    """The costs in chunks and with all logits at once. Times are medians over rounds. Each round runs both programs."""
    given = LESSONS[name].given(teacher, corpus.text)
    places = jax.random.choice(jax.random.key(0), corpus.training, (BATCH,))
    arguments = (next_word.initial(len(corpus.words), 0, STUDENT), corpus.text, places, *given)
    programs = [jax.jit(jax.value_and_grad(f)).lower(*arguments).compile() for f in LESSONS[name][:2]]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for program, taken in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            taken.append(time.perf_counter() - start)
    in_chunks, of_whole = (
        Cost(next_word.temporary_bytes(program) / 1e6, 1e3 * statistics.median(taken))
        for program, taken in zip(programs, seconds, strict=True)
    )
    return in_chunks, of_whole


# The picture


@matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.labelsize": 16, "figure.titlesize": 23})
def picture(
    histories: dict[str, list[Snapshot]], trained: float, unigram: float, spent: dict[str, tuple[Cost, Cost]]
) -> Figure:
    """The held-out perplexity of each student by step, and the cost of a batch in chunks and with all logits."""
    figure = Figure(figsize=(18, 8), dpi=100, layout="constrained")
    figure.suptitle(f"A model of width {WIDTH} teaches one of {STUDENT}: what to learn from, and what a batch costs")
    left, *right = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for name, history in histories.items():
        steps, _, perplexities, *_ = zip(*history, strict=True)
        left.plot(steps, perplexities, LESSONS[name].stroke, color=LESSONS[name].colour, linewidth=4, label=name)
    for level, of in ((unigram, "by frequency alone"), (trained, "the teacher")):
        left.axhline(level, color="black", linewidth=1.5)
        left.annotate(of, (0, level), (0, 5), textcoords="offset points")
    top = 1.5 * max(unigram, *(history[-1].perplexity for history in histories.values()))  # cuts off the first steps
    left.set(title="perplexity of the held-out words", xlabel="step", ylim=(0.8 * trained, top))
    left.legend(title="learns from", handlelength=3, loc="upper right")
    for axes, field, title in zip(right, Cost._fields, ("megabytes", "milliseconds"), strict=True):
        _draw_costs(axes, field, title, spent)
    right[0].legend(loc="upper right")
    right[0].margins(y=0.25)
    for axes in (left, *right):
        axes.grid(color="0.88", axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_costs(axes: Axes, field: str, title: str, spent: dict[str, tuple[Cost, Cost]]) -> None:
    for k, (label, look) in enumerate({"in chunks": {}, "all at once": {"hatch": "//", "alpha": 0.5}}.items()):
        heights = [getattr(pair[k], field) for pair in spent.values()]
        at = [i + 0.4 * k - 0.2 for i in range(len(spent))]
        colours = [LESSONS[name].colour for name in spent]
        axes.bar_label(axes.bar(at, heights, 0.38, color=colours, edgecolor="black", **look), fmt="{:,.0f}")
        axes.bar(0, 0, color="0.5", label=label, edgecolor="black", **look)
    names = [name.replace(" and ", "\nand ") for name in spent]
    axes.set(title=f"{title}, value and gradient", xticks=range(len(spent)), xticklabels=names)


# The command line


def _run(corpus: Corpus, steps: int, seed: int, out: str) -> None:
    n = len(corpus.words)
    print(f"words: {corpus.text.size:,}, of which {corpus.held_out.size:,} are held out; vocabulary: {n:,}")
    bar = functools.partial(tqdm, total=21, leave=False, disable=None, unit=" parts", dynamic_ncols=True)
    *_, trained = bar(train(corpus, steps, seed=seed), "the teacher")
    unigram = next_word.unigram_perplexity(corpus)
    print(
        f"perplexity of the held-out words: by word frequency alone {unigram:.1f}, by the teacher (width {WIDTH})"
        f" {trained.perplexity:.1f}\n\nand by students (width {STUDENT}) that learn from"
    )
    histories = {
        name: list(bar(lesson(corpus, name, trained.model, steps, seed=seed), f"from {name}")) for name in LESSONS
    }
    print(f"{'step':>8}" + "".join(f"{name:>24}" for name in histories))
    for row in zip(*histories.values(), strict=True):
        print(f"{row[0].step:8}" + "".join(f"{s.perplexity:24.1f}" for s in row))
    print(f"\n{'':24}{'KL(teacher‖student),':>22}{'a batch, value and gradient: in chunks / with all logits':>60}")
    print(f"{'':24}{'held-out words':>22}{'MB':>30}{'ms':>30}")
    spent = {}
    for name, history in histories.items():
        kl = float(distance(history[-1].model, corpus.text, corpus.held_out, trained.model))
        spent[name] = chunks, logits = costs(corpus, name, trained.model)
        sizes, times = ((f"{a:,.1f} / {b:,.1f}") for a, b in zip(chunks, logits, strict=True))
        print(f"{name:24}{kl:22.4f}{sizes:>30}{times:>30}")
    picture(histories, trained.perplexity, unigram, spent).savefig(out)
    print(f"\npicture: {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains teacher and students, prints a table and writes the picture.

    The exit status is 2 for wrong input, and 130 after Ctrl-C.
    """
    claim = "Train narrow next-word models with a wide one as the teacher, on three kinds of targets."
    parser = training_parser(PROGRAM, claim)
    parser.add_argument("--out", type=png, default="distill.png", help="The picture to write (default: %(default)s).")
    args = parser.parse_args(argv)
    _run(args.text or read(default_text()), args.steps, args.seed, args.out)
    return 0


if __name__ == "__main__":
    run(main)
