"""Tests of the distillation program: its losses, the stored teacher, and the printed output."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from notebooks.examples import distill, next_word
from tests.tools.test_next_word import TEXT


@pytest.fixture(scope="module")
def corpus():
    return next_word.read(TEXT)


@pytest.fixture
def teacher(corpus, rng):
    n, width = len(corpus.words), next_word.WIDTH
    return next_word.Model(*(jnp.asarray(rng.standard_normal(s), np.float32) for s in ((n, width), (n, width), (n,))))


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize("name", distill.LESSONS)
@pytest.mark.slow
def test_the_losses_equal_those_of_whole_logits(name, corpus, teacher, rng):
    """Value and gradient are compared, for a student with random parameters."""
    in_chunks, of_whole_logits, given, *_ = distill.LESSONS[name]
    student = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
        next_word.initial(len(corpus.words), 0, distill.STUDENT),
    )
    arguments = (student, corpus.text, corpus.training[:300], *given(teacher, corpus.text))
    ours, dense = (jax.jit(jax.value_and_grad(f))(*arguments) for f in (in_chunks, of_whole_logits))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, dense)


@pytest.mark.slow
def test_the_stored_teacher(corpus, teacher):
    words, log_p = distill.top_words(teacher, corpus.text)
    assert words.shape == (corpus.text.size, distill.KEPT)
    q = np.exp(np.float64(distill.whole(teacher, corpus.text, corpus.held_out)))
    expected = np.sort(q, 1)[:, ::-1]
    np.testing.assert_allclose(np.exp(log_p[corpus.held_out, :-1]), expected[:, : distill.KEPT], rtol=1e-4)
    np.testing.assert_allclose(np.exp(log_p[corpus.held_out, -1]), expected[:, distill.KEPT :].sum(1), rtol=1e-4)
    of_words = np.take_along_axis(q, np.asarray(words[corpus.held_out]), 1)
    np.testing.assert_allclose(of_words, expected[:, : distill.KEPT], rtol=1e-4)


# The command line


@pytest.mark.needs_jit  # prints the memory of compiled programs
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = [str(tmp_path / "text.txt"), "--steps", "20", "--seed", "1", "--out", str(tmp_path / "out.png")]
    assert distill.main(arguments) == 0
    assert (tmp_path / "out.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    steps = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in steps] == [str(i) for i in range(21)]
    assert steps[0][1] == steps[0][2] == steps[0][3]  # the same start
    assert all(float(last) < float(first) for first, last in zip(steps[0][1:], steps[-1][1:], strict=True))
    for name in distill.LESSONS:
        assert re.search(rf"^{name} +\d\.\d+ +[\d.]+ / [\d.]+ +[\d.]+ / [\d.]+$", out, re.MULTILINE)
