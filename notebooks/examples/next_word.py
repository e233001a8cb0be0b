"""Trains a next-word model on a text, with every word as a class: `python -m notebooks.examples.next_word [TEXT]`.

The hidden state is the mean of the embeddings of the last few words. `jce.linear_cross_entropy` computes the head and
the loss in chunks, so all logits of a batch never exist at the same time, however large the vocabulary is. optax's Adam
trains the model on nine tenths of the text. The perplexity of the other tenth starts at the size of the vocabulary, and
falls below the perplexity of a model that knows only how frequent each word is.

The same in Python:

    corpus = read(text)
    for snapshot in train(corpus, steps=300):
        print(snapshot.step, snapshot.perplexity)
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jce
from jce._programs.command_line import Parser, extra, integer, run, text_file

PROGRAM = "python -m notebooks.examples.next_word"

with extra(PROGRAM, __name__, "-e '.[notebooks]'"):
    import optax
    from tqdm import tqdm

    from jce.demo import default_text

CONTEXT = 4  # words
STRETCH = 100  # words; the last of every ten stretches is held out
BATCH, CHUNK = 4096, 256  # words
WIDTH = 64  # the size of an embedding


# The text


class Corpus(NamedTuple):
    """A text as word indices, and the places of the words to predict."""

    words: np.ndarray  # the vocabulary
    text: Array  # int[length], the index of each word in the vocabulary
    training: Array  # the places of the words to train on
    held_out: Array  # the places of the words to test on


def read(text: str) -> Corpus:
    """The corpus of a text. Its words are the runs of letters, digits and _, in lower case.

    Raises:
      ValueError: if there are too few words to hold some out.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) < 20 * STRETCH:
        raise ValueError(f"has {len(words)} words, which is too few to learn from: at least {20 * STRETCH}")
    vocabulary, numbers = np.unique(words, return_inverse=True)
    places = np.arange(CONTEXT, len(words))
    held_out = places // STRETCH % 10 == 9
    return Corpus(
        vocabulary,
        jnp.asarray(numbers.ravel(), jnp.int32),
        jnp.asarray(places[~held_out], jnp.int32),
        jnp.asarray(places[held_out], jnp.int32),
    )


def unigram_perplexity(corpus: Corpus) -> float:
    """The perplexity of the held-out words by their frequencies among the training words.

    Add-one smoothing makes no frequency 0.
    """
    counts = 1 + jnp.bincount(corpus.text[corpus.training], length=len(corpus.words))
    return float(jnp.exp(-jnp.log(counts / counts.sum())[corpus.text[corpus.held_out]].mean()))


# The model


class Model(NamedTuple):
    embedding: Array  # [n, d]
    head: Array  # [n, d]
    bias: Array  # [n]


def initial(n: int, seed: int, width: int = WIDTH) -> Model:
    embedding = jax.random.normal(jax.random.key(seed), (n, width))
    return Model(embedding, jnp.zeros((n, width)), jnp.zeros(n))


def hidden_states(model: Model, text: Array, places: Array) -> Array:
    """[tokens, d]: the mean of the embeddings of the CONTEXT words before each place."""
    context = places[:, None] - jnp.arange(1, CONTEXT + 1, dtype=places.dtype)[None]
    return model.embedding[text[context]].mean(1)


def fused(labels: Array, hidden: Array, head: Array, bias: Array) -> Array:
    """The mean cross-entropy of the labels, computed in chunks."""
    return jce.linear_cross_entropy(labels, hidden, head, bias, chunk_size=CHUNK)


def dense(labels: Array, hidden: Array, head: Array, bias: Array) -> Array:
    """The same number as it is usually computed, from all logits at once."""
    logits = hidden @ head.T + bias[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss(model: Model, text: Array, places: Array) -> Array:
    """The mean cross-entropy of the words at these places."""
    return fused(text[places], hidden_states(model, text, places), model.head, model.bias)


class Snapshot(NamedTuple):
    step: int
    loss: float  # for the last batch
    perplexity: float  # of the held-out words
    words_per_second: float  # since the previous snapshot, including compilation
    model: Model


def train(
    corpus: Corpus,
    steps: int,
    *,
    seed: int = 0,
    width: int = WIDTH,
    objective: Callable[..., Array] = loss,
    given: Sequence[Any] = (),
) -> Iterator[Snapshot]:
    """Trains with Adam on random batches. Yields a snapshot at the start, and up to 20 at equal intervals.

    It minimizes `objective(model, text, places, *given)`. It is a generator, so that a caller can show progress, or
    stop.
    """
    model, optimizer = initial(len(corpus.words), seed, width), make_optimizer(steps)
    text, training, held_out = corpus.text, corpus.training, corpus.held_out
    state, key = optimizer.init(model), jax.random.key(seed + 1)
    yield Snapshot(0, math.nan, float(_perplexity(model, text, held_out)), 0.0, model)
    done = 0
    for mark in _marks(steps):
        start = time.perf_counter()
        model, state, last = jax.block_until_ready(
            _descend(model, state, key, text, training, done, mark, optimizer, objective, given)
        )
        speed = (mark - done) * BATCH / (time.perf_counter() - start)
        yield Snapshot(mark, float(last), float(_perplexity(model, text, held_out)), speed, model)
        done = mark


@functools.cache  # the same object for the same arguments, so that `_descend` is compiled once
def make_optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.01, steps))


def _marks(steps: int) -> list[int]:
    return sorted({math.ceil(steps * k / 20) for k in range(1, 21)})


@functools.partial(jax.jit, static_argnames=("optimizer", "objective"))
def _descend(model, state, key, text, training, first, last, optimizer, objective, given):
    def step(i, carry):
        model, state, _ = carry
        places = jax.random.choice(jax.random.fold_in(key, i), training, (BATCH,))
        value, gradient = jax.value_and_grad(objective)(model, text, places, *given)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, updates), state, value

    return lax.fori_loop(first, last, step, (model, state, jnp.zeros(())))


@jax.jit
def _perplexity(model, text, places):
    return jnp.exp(loss(model, text, places))


def head_and_loss_bytes(head_and_loss: Callable, n: int) -> int:
    """The temporary memory for value and gradient of a batch. The program is compiled, but doesn't run."""
    labels = jax.ShapeDtypeStruct((BATCH,), np.int32)
    hidden, head, bias = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((BATCH, WIDTH), (n, WIDTH), (n,)))
    return temporary_bytes(
        jax.jit(jax.value_and_grad(head_and_loss, (1, 2, 3))).lower(labels, hidden, head, bias).compile()
    )


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """The memory that a program needs beyond its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


# The command line


def training_parser(program: str, claim: str) -> Parser:
    parser = Parser(prog=program, description=claim)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="?", type=_corpus, help="A UTF-8 file (default: Python's own documentation).")
    add(
        "--steps",
        type=integer(1, 10**9),
        default=300,
        help="The number of steps for each model; the learning rate falls to 0 (default: %(default)s).",
    )
    add("--seed", type=integer(0, 2**31 - 1), default=0, help="The seed for models and batches (default: %(default)s).")
    return parser


def _corpus(name: str) -> Corpus:
    text = text_file(name)
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name!r} {error}") from None


def _run(corpus: Corpus, steps: int, seed: int) -> None:
    n = len(corpus.words)
    print(f"words: {corpus.text.size:,}, of which {corpus.held_out.size:,} are held out; vocabulary: {n:,}")
    ours, theirs = (head_and_loss_bytes(f, n) / 1e6 for f in (fused, dense))
    print(
        f"memory of head and loss for {BATCH:,} words: {ours:,.1f} MB in chunks of {CHUNK} words,"
        f" with all logits {theirs:,.1f} MB"
    )
    unigram = unigram_perplexity(corpus)
    print(f"perplexity of the held-out words by their frequency alone: {unigram:.1f}\n")
    print(f"{'step':>9} {'batch loss':>11} {'held-out perplexity':>20} {'words/s':>10}")
    history = []
    with tqdm(total=steps, unit=" steps", leave=False, disable=None, dynamic_ncols=True) as bar:
        for s in train(corpus, steps, seed=seed):
            bar.update(s.step - bar.n)
            loss, speed = (f"{s.loss:.4f}", f"{s.words_per_second:,.0f}") if s.step else ("-", "-")
            bar.write(f"{s.step:9} {loss:>11} {s.perplexity:20.1f} {speed:>10}")
            history.append(s)
    best = min(history, key=lambda s: s.perplexity)
    print(f"\nlowest perplexity: {best.perplexity:.1f}, at step {best.step}; by frequency alone {unigram:.1f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the model and prints a table.

    The exit status is 2 for wrong input, and 130 after Ctrl-C.
    """
    claim = "Train a model to predict the next word of a text, with jce.linear_cross_entropy as head and loss."
    args = training_parser(PROGRAM, claim).parse_args(argv)
    _run(args.text or read(default_text()), args.steps, args.seed)
    return 0


if __name__ == "__main__":
    run(main)
