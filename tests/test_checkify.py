"""`checkify` finds checks in mapped functions and every NaN in a result of jce, but no other NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jce
from tests.kernels import each_function, each_kernel
from tests.test_corners import stacked

pytestmark = [pytest.mark.needs_jit, pytest.mark.holds_nan]

LABELS, HEAD = np.array([0, 1, 2, 3, 0, 1]), np.eye(4, 3, dtype=np.float32)
HIDDEN = np.arange(18, dtype=np.float32).reshape(6, 3) / 10
SOME = np.array([True, True, False, True, True, True])
WAYS = {
    "each": {},
    "mean": {"reduction": "mean", "chunk_size": 2},
    "some": {"where": SOME},
    "filled": {"where": SOME, "chunk_size": 4, "batch_invariant": True},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
label_loss = jce.cross_entropy_with_integer_labels


def found(function, *arguments, errors=checkify.float_checks) -> str | None:
    return jax.jit(checkify.checkify(jax.jit(function), errors=errors))(*arguments)[0].get()


def mapped(function, **options):
    return lambda h: jce.linear_map(function, LABELS, jce.Linear(h, HEAD), **options)


def gradient(function):
    return jax.grad(lambda h: function(h).sum())


def batch(function):
    return jax.vmap(function)


def largest_below(limit):
    def function(y, x):
        checkify.check(x.max() < limit, "a logit of {m}", m=x.max())
        return label_loss(y, x)

    return function


@each_kernel
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.in_turn(8, "wide")
def test_a_nan_is_found_if_and_only_if_a_result_is_nan(kernel, step):
    arguments, values, gradients = stacked(kernel)
    positions = tuple(range(len(arguments)))
    of_value, of_gradient = (
        jax.jit(checkify.checkify(f, errors=checkify.float_checks))
        for f in (jax.jit(kernel.function), jax.jit(jax.grad(kernel.function, positions)))
    )
    for i in range(0, len(values), step):
        corner = [np.float32(x[i]) for x in arguments]
        assert bool(of_value(*corner)[0].get()) == bool(np.isnan(values[i]))
        if np.isfinite(values[i]) and all(np.isfinite(g[i]).all() for g in gradients):
            assert of_gradient(*corner)[0].get() is None


@each_way
@pytest.mark.parametrize("change", [lambda f: f, gradient, batch], ids=["value", "gradient", "batch"])
@pytest.mark.slow
def test_a_check_in_a_mapped_function(options, change):
    h = np.stack([HIDDEN, HIDDEN]) if change is batch else HIDDEN
    for limit, message in ((100, None), (1, "a logit of 1.")):
        got = found(change(mapped(largest_below(limit), **options)), h, errors=checkify.user_checks)
        assert got is None if message is None else message in got
    assert found(change(mapped(label_loss, **options)), h, errors=checkify.all_checks) is None


INDEXED = {
    "a logit": lambda y, x: x[y],
    "an index inside of a jit": lambda y, x: jax.jit(lambda x: x[y])(x),
    "a part": lambda y, x: jax.lax.dynamic_slice(x, (y,), (2,)).sum(),
    "a logit that is set": lambda y, x: x.at[y].set(0.0).sum(),
    "two rows of a constant": lambda y, x: (jnp.ones((5, 4))[y] * x).sum(),
}


@each_way
@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.in_turn(20)
def test_indices_in_a_mapped_function(options, name):
    """A lookup out of range is reported in values and derivatives, but not for a masked token."""
    good, bad = np.array([0, 1, 2, 1, 0, 1]), np.array([0, 1, 2, 9, 0, 1])
    masked = np.array([0, 1, 9, 1, 0, 1]) if "where" in options else good

    def of(labels):
        return lambda h: jce.linear_map(INDEXED[name], labels, jce.Linear(h, HEAD), **options).sum()

    for change, errors in ((lambda f: f, checkify.index_checks), (jax.grad, checkify.all_checks)):
        if "is set" not in name:  # JAX doesn't check updates of a batch
            assert "out-of-bounds" in found(change(of(bad)), HIDDEN, errors=errors)
        assert found(change(of(masked)), HIDDEN, errors=errors) is None


def test_indices_in_a_head():
    table = jnp.ones((5, 3))
    for classes, message in ((np.array([0, 1, 2]), None), (np.array([0, 1, 7]), "out-of-bounds")):

        def loss(h, classes=classes):
            return jce.linear_cross_entropy(LABELS % 3, h, lambda h: h @ table[classes].T)

        for change in (lambda f: f, jax.grad):
            got = found(change(loss), HIDDEN, errors=checkify.index_checks)
            assert message in got if message else got is None


@each_way
@pytest.mark.slow
def test_distributions_and_nans_in_a_mapped_function(options):
    def no_distribution(y, x):
        jce.check_distribution(jnp.where(y == 3, 2.0, 1.0) * jax.nn.softmax(x))
        return label_loss(y, x)

    assert "is not a distribution" in found(mapped(no_distribution, **options), HIDDEN, errors=checkify.user_checks)
    made = mapped(lambda y, x: jnp.log(x.min() - 10), **options)
    assert "nan" in found(made, HIDDEN)
    assert "nan" in found(gradient(made), HIDDEN)


@each_way
@pytest.mark.slow
def test_a_label_outside_the_classes(options):
    loss = functools.partial(jce.linear_cross_entropy, **options)
    labels = np.where(np.arange(6) == 0, 99, LABELS)
    assert "nan" in found(lambda h: loss(labels, h, HEAD), HIDDEN)
    assert found(lambda h: loss(LABELS, h, HEAD), HIDDEN) is None
    assert "nan" in found(lambda x: label_loss(labels, x), HIDDEN)


def test_values_out_of_the_domain():
    assert "nan" in found(jce.entropy_with_logits, np.array([np.nan, 1, 2], np.float32))
    assert "nan" in found(jce.kl_divergence, np.array([0.5, 0.5], np.float32), np.array([1.5, -0.5], np.float32))


SEVERAL, PROBS = np.array([[0, 1]] * 6), np.full((6, 2), 0.4, np.float32)
OF_SEVERAL = {
    "targets": lambda y, x: jce.cross_entropy_with_integer_labels(y, x, label_probs=PROBS, tail=True),
    "log-probabilities": jce.log_probs_with_integer_labels,
    "and a tail": lambda y, x: jce.log_probs_with_integer_labels(y, x, tail=True),
    "of a head": lambda y, h: jce.linear_log_probs(y, h, HEAD).log_prob,
    "targets of a head": lambda y, h: jce.linear_cross_entropy(y, h, HEAD, label_probs=PROBS, tail=True),
}


@pytest.mark.parametrize("function", OF_SEVERAL.values(), ids=OF_SEVERAL)
@pytest.mark.slow
def test_several_labels(function):
    wrong = np.where(np.arange(6)[:, None] == 0, 99, SEVERAL)
    for change in (lambda f: f, gradient):
        assert found(change(functools.partial(function, SEVERAL)), HIDDEN, errors=checkify.all_checks) is None
    assert "nan" in found(functools.partial(function, wrong), HIDDEN)


@each_function
@pytest.mark.in_turn(8, "wide")
def test_the_gradient_of_a_checked_function(kernel):
    """Heads are not tested. Their checks are in a custom_jvp function, for which JAX 0.8 to 0.12 raises an error."""
    arguments, *_ = stacked(kernel)
    positions = tuple(range(len(arguments)))

    def total(*arguments):
        return kernel.function(*arguments).sum()

    checked = checkify.checkify(total, errors=checkify.all_checks)
    corner = [np.float32(x[0]) for x in arguments]
    got = jax.jit(jax.grad(lambda *a: checked(*a)[1], positions))(*corner)
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(jax.grad(total, positions))(*corner))
