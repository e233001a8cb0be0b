"""Training on the digits: three losses agree at first, and later only one of them is still accurate in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from notebooks.examples import max_margin


def history(name, steps):
    loss, dtype, *_ = max_margin.CURVES[name]
    return list(max_margin.train(loss, dtype, steps))


def at(snapshots, step):
    return next(s for s in snapshots if s.step == step)


def test_digits():
    features, labels = max_margin.digits()
    assert features.shape == (1797, 65)
    assert (features.min(), features.max()) == (0, 1)
    assert (features[:, -1] == 1).all()
    assert sorted(set(labels.tolist())) == list(range(10))


@pytest.mark.slow
def test_largest_margin():
    assert max_margin.largest_margin() == pytest.approx(0.0470835, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-33, 1e-30, 1e-19, 1.0, 1e19, 1e37])
def test_normalized(rng, scale):
    g = rng.normal(size=(65, 10)).astype(np.float32)
    actual = max_margin.normalized(jnp.asarray(np.float32(scale) * g))
    np.testing.assert_allclose(actual, g / np.linalg.norm(g.astype(float)), rtol=2e-6)


def descend_in_numpy(steps):
    """The margin and the mean loss after that many steps, from the formulas in float64."""
    h, y = max_margin.digits()
    w, one_hot = np.zeros((65, 10)), np.eye(10)[y]
    for _ in range(steps):
        e = np.exp(h @ w - (h @ w).max(1, keepdims=True))
        g = h.T @ (e / e.sum(1, keepdims=True) - one_hot)
        w -= 0.5 * g / np.linalg.norm(g)
    x = h @ w
    others = np.where(one_hot == 1, -np.inf, x).max(1)
    x_y = (x * one_hot).sum(1)
    return ((x_y - others) / np.linalg.norm(w)).min(), (np.log(np.exp(x).sum(1)) - x_y).mean()


@pytest.mark.slow
def test_all_agree_at_the_start():
    margin, loss = descend_in_numpy(300)
    for name in max_margin.CURVES:
        snapshots = history(name, 300)
        margins = [s.margin for s in snapshots]
        assert snapshots[-1].step == 300
        assert margins[-1] > at(snapshots, 100).margin > margins[0]
        assert margins[-1] == pytest.approx(margin, rel=1e-4)
        assert snapshots[-1].loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_jce_converges_to_the_largest_margin_in_float32():
    snapshots = history("jce, float32", 100_000)
    margins = np.array([s.margin for s in snapshots])
    assert np.isfinite(snapshots).all()
    assert (np.diff(margins[10:]) > 0).all()
    assert at(snapshots, 44_000).margin == pytest.approx(0.0437, rel=0.01)
    assert 0.96 < margins[-1] / max_margin.largest_margin() < 1
    assert 0 < snapshots[-1].loss < 1e-20


@pytest.mark.slow
@pytest.mark.long
def test_the_textbook_formula_fails_in_float32():
    snapshots = history("textbook, float32", 60_000)
    best = max(snapshots, key=lambda s: s.margin)
    assert best.margin == pytest.approx(0.0405, rel=0.02)
    assert 15_000 < best.step < 30_000
    assert snapshots[-1].margin < 0.01
    assert snapshots[-1].loss == 0


# The command line


@pytest.mark.slow
def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert max_margin.main(["--steps", "120"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["100", "120"]
    for row in rows:
        margins, losses = np.array(row[1:], float).reshape(3, 2).T
        np.testing.assert_allclose(margins, margins[0], rtol=1e-3)
        np.testing.assert_allclose(losses, losses[0], rtol=1e-2)
    picture = (tmp_path / "max_margin.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 30_000 < len(picture) < 300_000
