"""Tests of the next-word program: words, perplexity, the loss, training, and the printed output."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from notebooks.examples import next_word

# A text with 36 different words. It repeats after 97 words, so the words before predict the next one.
TEXT = " ".join(f"w{i * i % 97 % 50}" for i in range(3000))


@pytest.fixture(scope="module")
def corpus():
    return next_word.read(TEXT)


def test_words_and_positions():
    corpus = next_word.read("To be, or not_to-BE: " * 400)
    assert list(corpus.words) == ["be", "not_to", "or", "to"]
    np.testing.assert_array_equal(corpus.text[:5], [3, 0, 2, 1, 0])
    held_out, training = np.asarray(corpus.held_out), np.asarray(corpus.training)
    assert (held_out // 100 % 10 == 9).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([held_out, training])), np.arange(4, 2000))


@pytest.mark.slow
def test_unigram_perplexity():
    """The text has 1999 times a, and one b, which is held out. Every word counts once more than it was seen."""
    words = ["a"] * 2000
    words[950] = "b"
    corpus = next_word.read(" ".join(words))
    a, b = 1797 / 1798, 1 / 1798  # a occurs 1796 times in training, and each word counts once more
    assert len(corpus.training) == 1796
    assert next_word.unigram_perplexity(corpus) == pytest.approx(np.exp(-(199 * np.log(a) + np.log(b)) / 200), rel=1e-5)


@pytest.mark.slow
def test_the_hidden_state_is_the_mean_of_the_words_before(corpus):
    model = next_word.initial(len(corpus.words), 0)
    (state,) = next_word.hidden_states(model, corpus.text, jnp.array([10]))
    np.testing.assert_allclose(state, model.embedding[corpus.text[6:10]].mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.needs_jit
@pytest.mark.slow
def test_the_loss_equals_the_dense_loss(corpus, rng):
    n = len(corpus.words)
    embedding = next_word.initial(n, 0).embedding
    head, bias = (jnp.asarray(rng.standard_normal(s), embedding.dtype) for s in ((n, next_word.WIDTH), (n,)))
    model = next_word.Model(embedding, head, bias)
    hidden = next_word.hidden_states(model, corpus.text, corpus.training)
    labels = corpus.text[corpus.training]
    expected = next_word.dense(labels, hidden, model.head, model.bias)
    np.testing.assert_allclose(next_word.loss(model, corpus.text, corpus.training), expected, rtol=1e-5)
    assert next_word.head_and_loss_bytes(next_word.fused, 5000) * 10 < next_word.head_and_loss_bytes(
        next_word.dense, 5000
    )


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_training(corpus):
    history = list(next_word.train(corpus, 60, seed=3))
    assert [s.step for s in history] == list(range(0, 61, 3))
    assert history[0].perplexity == pytest.approx(len(corpus.words), rel=1e-5)
    assert history[-1].perplexity < next_word.unigram_perplexity(corpus) / 5
    assert history[-1].loss < history[1].loss
    assert all(s.words_per_second > 0 for s in history[1:])
    assert [s.step for s in next_word.train(corpus, 3)] == [0, 1, 2, 3]


# The command line


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.mark.needs_jit  # prints the memory of a compiled program
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_command_line(file, capsys):
    assert next_word.main([file, "--steps", "20", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    n = len(set(TEXT.split()))
    assert f"words: 3,000, of which 300 are held out; vocabulary: {n}" in out
    sizes = r"memory of head and loss for 4,096 words: ([\d.]+) MB in chunks of 256 words, with all logits ([\d.]+) MB"
    memory = re.search(sizes, out)
    assert memory
    assert float(memory[1]) < float(memory[2])
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == [str(i) for i in range(21)]
    best = re.search(r"lowest perplexity: ([\d.]+), at step \d+; by frequency alone ([\d.]+)", out)
    assert best
    assert float(best[1]) == min(float(row[2]) for row in rows)
    assert float(best[1]) < float(best[2])
