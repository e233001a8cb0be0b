"""Tests of the demo: p from a text, the fit of q = softmax(θ) to p, the command line, and the picture."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jce import demo

TEXT = "Hello, WORLD! 42 hello"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def rows(p, letters):
    """{character: {next character: frequency}}, without the zeros."""
    return {
        a: {b: float(x) for b, x in zip(demo.ALPHABET, row, strict=True) if x}
        for a, row in zip(letters, p, strict=True)
    }


def table(out):
    """The printed table, as {step: [H(p), H(p,q), KL, perplexity, max|q-p|]}."""
    lines = [line.split() for line in out.split(demo.HEADER)[1].split("\n\n")[0].strip().splitlines()]
    return {int(step): [float(x) for x in numbers] for step, *numbers in lines}


# The targets


def test_frequencies_counted_manually():
    p, letters = demo.transition_distributions(TEXT)  # the demo reads this as "hello world hello"
    assert letters == "dehlorw "
    assert rows(p, letters) == {
        "h": {"e": 1},
        "e": {"l": 1},
        "l": pytest.approx({"l": 2 / 5, "o": 2 / 5, "d": 1 / 5}),
        "o": pytest.approx({" ": 1 / 2, "r": 1 / 2}),
        "w": {"o": 1},
        "r": {"l": 1},
        "d": {" ": 1},
        " ": {"w": 0.5, "h": 0.5},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", {"a": {"b": 1}}),  # nothing follows the b: no row
        ("ab\n", {"a": {"b": 1}, "b": {" ": 1}}),
        ("Z\u00e9--\u00df\u00dfZ", {"z": {" ": 1}, " ": {"z": 1}}),  # a run of other characters is one space
        ("\ta", {" ": {"a": 1}}),
    ],
)
def test_small_texts(text, expected):
    assert rows(*demo.transition_distributions(text)) == expected


def test_default_text():
    p, letters = demo.transition_distributions(demo.default_text())
    assert p.dtype == jnp.result_type(float)
    assert letters == demo.ALPHABET
    assert 100 < (p == 0).sum() < 300
    np.testing.assert_allclose(p.sum(1), 1, rtol=0, atol=5e-7)


# The fit

# Without jit, optax's L-BFGS compiles a program for every step, and the memory for programs runs out.
long_by_lbfgs = pytest.mark.needs_jit


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=long_by_lbfgs if name == "lbfgs" else ()) for name in demo.OPTIMIZERS]
)
@pytest.mark.slow
def test_fit(name):
    p, _ = demo.transition_distributions(TEXT)
    history = list(demo.fit(p, demo.make_optimizer(name), 300))
    start, end = history[0], history[-1]
    assert (start.step, end.step) == (0, 300)
    assert start.kl > 1
    assert end.kl < {"sgd": 4e-3, "nesterov": 1e-5, "adam": 3e-3, "lbfgs": 1e-7}[name]
    assert end.distance < 3 * end.kl**0.5
    for s in history:
        q = np.asarray(s.q, float)
        np.testing.assert_allclose(q.sum(1), 1, rtol=0, atol=1e-6)
        # The numbers agree with formulas for p and q, and with each other.
        p_log_q = np.where(p > 0, p * np.log(np.where(p > 0, q, 1)), 0)
        assert s.cross_entropy == pytest.approx(-p_log_q.sum(1).mean(), rel=1e-5)
        assert s.kl == pytest.approx(s.cross_entropy - s.entropy, abs=1e-6)
        assert s.distance == pytest.approx(np.abs(q - p).max(), rel=1e-4, abs=2e-7)
        assert s.perplexity == pytest.approx(np.exp(s.cross_entropy), rel=1e-6)
        assert s.disagreement < 5e-7


@long_by_lbfgs
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_lbfgs_never_climbs():
    p, _ = demo.transition_distributions(demo.default_text())
    for seed in (0, 3):
        gaps = np.array([s.kl for s in demo.fit(p, demo.make_optimizer("lbfgs"), 300, seed=seed)])
        assert gaps[-1] < 1e-6
        assert (np.diff(gaps) <= 1e-6 * gaps[:-1]).all()


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_seed():
    p, _ = demo.transition_distributions(TEXT)
    one, same, other = (list(demo.fit(p, demo.make_optimizer("sgd"), 20, seed=seed)) for seed in (7, 7, 8))
    assert [s.kl for s in one] == [s.kl for s in same]
    assert all(a.kl != b.kl for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("optax_promotes")
def test_divergence_raises():
    p, _ = demo.transition_distributions(TEXT)
    with pytest.raises(FloatingPointError, match=r"H\(p,q\) is (inf|nan) at step \d+: the fit diverged"):
        list(demo.fit(p, demo.make_optimizer("sgd", 1e5), 20))


@pytest.mark.slow
def test_chain_rule_agrees(rng):
    p, _ = demo.transition_distributions(TEXT)
    theta = jnp.asarray(4 * rng.normal(size=p.shape), jnp.float32)
    gradient = jax.vmap(demo.chain_rule_gradient)(p, theta)
    z = np.asarray(theta, float)
    q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(gradient, q - np.asarray(p, float), rtol=0, atol=5e-7)


# The command line


@long_by_lbfgs
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_defaults_converge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # if the output isn't a terminal, there is no progress bar
    assert demo.main([]) == 0
    out, err = capsys.readouterr()
    lines = table(out)
    assert list(lines) == [0, 1, 3, 10, 30, 100, 300, 1000]
    entropy, cross_entropy, kl, perplexity, distance = lines[1000]
    assert kl <= 1e-5 / 30
    assert cross_entropy == pytest.approx(entropy, abs=1e-5)
    assert perplexity == pytest.approx(np.exp(cross_entropy), rel=1e-5)
    assert distance < 1e-4
    assert float(out.split("largest difference")[1].split()[0]) < 1e-6
    assert all(f"{name}  " in err or f"{name}:" in err for name in demo.OPTIMIZERS)  # one progress bar each
    assert "H(p,q) " in err
    assert ", gap " in err
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 100_000 < len(picture) < 300_000


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_options(file, tmp_path, capsys):
    out = tmp_path / "out.png"
    argv = [
        str(file),
        "--optimizer",
        "adam",
        "--learning-rate",
        "0.5",
        "--steps",
        "7",
        "--seed",
        "3",
        "--out",
        str(out),
    ]
    assert demo.main(argv) == 0
    text = capsys.readouterr().out
    assert "by adam with learning rate 0.5 from seed 3" in text
    lines = table(text)
    assert list(lines) == [0, 1, 3, 7]
    p, _ = demo.transition_distributions(TEXT)
    *_, end = demo.fit(p, demo.make_optimizer("adam", 0.5), 7, seed=3)
    assert lines[7][2] == pytest.approx(end.kl, rel=1e-2)
    assert out.stat().st_size > 50_000


@pytest.mark.usefixtures("optax_promotes")
def test_divergence_is_one_line(file, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert demo.main([str(file), "--optimizer", "sgd", "--learning-rate", "1e5", "--out", str(out)]) == 1
    assert "diverged; choose a smaller --learning-rate\n" in capsys.readouterr().err
    assert not out.exists()


def test_checking_out_changes_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_run", lambda args: None)
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_bytes(b"old")
    assert demo.main(["--out", str(old)]) == demo.main(["--out", str(new)]) == 0
    assert old.read_bytes() == b"old"
    assert not new.exists()
