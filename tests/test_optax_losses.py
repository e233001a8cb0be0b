"""The tests that optax ships for its losses, run with jce's functions in their place."""

import operator
import re
import unittest

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jce
from tests.test_package import README

classification = pytest.importorskip("optax.losses._classification")
suite = pytest.importorskip("optax.losses._classification_test")


def mask(where, logits, axis):
    """The mask with a class axis, which a mask of optax may lack."""
    return jnp.expand_dims(where, axis) if where is not None and np.ndim(where) < np.ndim(logits) else where


def softmax_cross_entropy(logits, labels, axis=-1, where=None):
    return jce.cross_entropy_with_logits(labels, logits, axis=axis, where=mask(where, logits, axis))


def softmax_cross_entropy_with_integer_labels(logits, labels, axis=-1, where=None):
    if isinstance(axis, tuple):
        logits = jnp.moveaxis(logits, axis, range(-len(axis), 0))
        logits, axis = logits.reshape(*logits.shape[: -len(axis)], -1), -1
    return jce.cross_entropy_with_integer_labels(labels, logits, axis=axis, where=mask(where, logits, axis))


def sigmoid_binary_cross_entropy(logits, labels):
    return jce.binary_cross_entropy_with_logits(labels, logits)


def kl_divergence(log_predictions, targets, axis=-1, where=None):
    return jce.kl_divergence(targets, jnp.exp(log_predictions), axis=axis, where=where)


OURS = {
    "SoftmaxCrossEntropyTest": softmax_cross_entropy,
    "SoftmaxCrossEntropyWithIntegerLabelsTest": softmax_cross_entropy_with_integer_labels,
    "SigmoidCrossEntropyTest": sigmoid_binary_cross_entropy,
    "KLDivergenceTest": kl_divergence,
}


@pytest.mark.needs_jit
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize("name", OURS)
@pytest.mark.slow
def test_optaxs_tests(name, monkeypatch):
    monkeypatch.setattr(classification, OURS[name].__name__, OURS[name])
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(getattr(suite, name)).run(result)
    assert result.testsRun > 0
    assert not result.errors + result.failures, "\n".join(text for _, text in result.errors + result.failures)


def test_optax_has_the_names_in_the_readme():
    (table,) = re.findall(r"\| optax, for logits.*?\n\n", README.read_text(encoding="utf-8"), re.DOTALL)
    names = re.findall(r"^\| `([\w.]+)\(", table, re.MULTILINE)
    assert len(names) >= 3
    assert all(callable(operator.attrgetter(name)(optax)) for name in names)
