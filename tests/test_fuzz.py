"""Property tests, on numbers of every binary exponent and under transformations chosen at random.

Each row of a batch is an example. `pytest tests/test_fuzz.py --hypothesis-profile=long` tries over 100,000 of them. The
seed is printed at the end. `--hypothesis-seed=$RANDOM` chooses another one.
"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

import jce
from tests.kernels import INF, LOGIT, Kernel, each_function, softmax, surprisals, weighted
from tests.oracle import conditioning, interior, partial, spacing, to_mp, ulps

BATCH = 16
BITS = {np.float32: 900, np.float64: 2600}  # for sums of numbers of every exponent
# Number of classes, their axis, dtype, and whether there is a mask. There are few, since each compiles a program. The
# short profile uses the first two.
VARIANTS = [
    (4, 0, "float32", True),
    (7, -1, "float32", False),
    (4, -1, "float64", True),
    (7, 0, "float64", False),
    (1, -1, "float32", True),
    (4, 0, "bfloat16", True),
    (7, -1, "float16", False),
]


def short() -> bool:
    return settings.default.max_examples < 100


# Numbers


def numbers(low: float, high: float, dtype: str) -> st.SearchStrategy[float]:
    """Numbers from low to high: near 1, of every binary exponent, subnormal, and the ends and zeros of the domain."""
    info = jnp.finfo(dtype)
    # The lowest number stands for -∞ in masks. Its difference from the largest logit, and p + q, must not overflow.
    least, most = max(low, float(info.min)), min(high, float(info.max) * (float(info.eps) / 8 if low < 0 else 0.25))

    def power(mantissa, exponent, sign):
        return float(np.clip(sign * mantissa * 2.0**exponent, least, most))

    exponents = st.integers(int(info.minexp) - int(info.nmant), int(info.maxexp) - 1)
    signs = st.sampled_from([1, -1] if low < 0 else [1])
    ends = [0.0, -0.0, float(info.tiny), 1.0, 1 - float(info.epsneg), least, most, low]
    return st.one_of(
        st.floats(-90, 90) if low < 0 else st.floats(0, 1),
        st.builds(power, st.floats(1, 2), exponents, signs),
        st.sampled_from([*ends, 20.0, 20.0] if low < 0 else ends),
    )


@functools.cache
def batches(kernel: Kernel, classes: int, dtype: str, strange: bool) -> st.SearchStrategy:
    """One array per argument, with numbers from its domain, and with NaN and ±∞ if `strange`."""

    def array(domain):
        # A probability is at most 1. Weights of any size are tested with the generalized form.
        low, high = domain if domain == LOGIT or kernel.function is jce.generalized_kl_divergence else (0, 1)
        elements = numbers(low, high, dtype)
        rounded = arrays(np.float64, (BATCH, classes), elements=elements | strangers if strange else elements)
        return rounded.map(lambda x: cast(x, dtype))

    strangers = st.sampled_from([np.nan, INF, -INF])
    return st.tuples(*map(array, kernel.domains))


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        x = x.astype(jnp.dtype(dtype))
        # XLA contradicts itself about subnormals (tests/test_plain_jax.py), and jaxlib 0.10's log does so op by op.
        contradicted = dtype == "bfloat16" or jax.config.jax_disable_jit
        unclear = contradicted & (np.abs(x) < jnp.finfo(x.dtype).tiny)
    return np.where(unclear, np.zeros_like(x), x)


# Programs


@functools.cache
def program(kernel: Kernel, axis: int, masked: bool):
    """A program that returns the batch's value and gradient, and each row's value and gradients in both modes."""
    positions = tuple(range(1, 1 + len(kernel.arguments)))

    def function(mask, *x):
        if not kernel.has_classes:
            return kernel.function(*x)
        where = {"where": jnp.moveaxis(mask, -1, axis)} if masked else {}
        return kernel.function(*(jnp.moveaxis(y, -1, axis) for y in x), axis=axis, **where)

    def total(*row):
        return function(*row).sum()

    def each(row):
        return function(*row), jax.grad(total, positions)(*row), jax.jacfwd(total, positions)(*row)

    @jax.jit
    def run(mask, x):
        return function(mask, *x), jax.grad(total, positions)(mask, *x), jax.lax.map(each, (mask, *x))

    return run


# Laws


def largest_finite(rows: np.ndarray) -> np.ndarray:
    return np.abs(np.where(np.isfinite(rows), rows, 0)).max(1, keepdims=True, initial=0)


def alike(got, expected, dtype, *x, scale=0) -> None:
    """Check equality to some ulps of the scale or of the row's largest number. NaN and infinities must match."""
    got, expected = (np.asarray(y, np.float64).reshape(BATCH, -1) for y in (got, expected))
    finite = np.isfinite(expected)
    largest = np.maximum(largest_finite(expected), scale)
    tolerance = 16 * float(jnp.finfo(dtype).eps) * largest + float(jnp.finfo(dtype).tiny)
    with np.errstate(invalid="ignore"):
        close = np.where(finite, np.abs(got - expected) <= tolerance, got == expected)
    wrong = ~(close | (np.isnan(got) & np.isnan(expected))).all(1)
    i = wrong.argmax()
    assert not wrong.any(), f"got {got[i]}, expected {expected[i]}, of {[y[i] for y in x]}"


def impossible(kernel: Kernel, x, mask) -> np.ndarray:
    """Rows whose kept logits are all -∞, except rows that are fully masked."""
    logits = [y for y, domain in zip(x, kernel.domains, strict=True) if domain == LOGIT and kernel.has_classes]
    return np.any([~(np.isfinite(y) & mask).any(1) & mask.any(1) for y in logits] or [np.zeros(BATCH, bool)], axis=0)


def judge(kernel: Kernel, x, mask, value, gradient, dtype) -> None:
    """Compare each row's value, and the first row's derivatives, with the formula, if it applies."""
    for i in range(BATCH):
        for k in [...] if kernel.has_classes else range(mask.shape[1]):
            row = [y[i][mask[i]] if kernel.has_classes else y[i, k] for y in x]
            got = value[i] if kernel.has_classes else value[i, k]
            if np.isnan(got) or not ordinary(kernel, row, mask[i], dtype):
                continue
            with mp.workprec(BITS[dtype.type]):
                exact_row = to_mp(row)
                exact = kernel.formula(*exact_row)
                scale = kernel.value_scale(*exact_row) if kernel.value_scale else exact
                lost = lost_in_the_largest_part(kernel, exact_row, dtype)
                bar = kernel.value_bar + conditioning(kernel, exact_row, dtype) + lost
                within(kernel, got, exact, scale, bar, dtype, row)
                if i:
                    continue
                scales = [scale and scale(*exact_row) for scale in kernel.gradient_scale]
                for a, j, z in interior(kernel, exact_row):
                    exact = partial(kernel.formula, exact_row, (a, j, z))
                    got = gradient[a][i][mask[i]][j] if kernel.has_classes else gradient[a][i, k]
                    bar = kernel.gradient_bar[a] + conditioning(kernel, exact_row, dtype, j) + lost
                    within(kernel, got, exact, scales[a][j] if scales[a] else exact, bar, dtype, row)


def ordinary(kernel: Kernel, row, mask, dtype) -> bool:
    """Whether the formula applies to the row, and all of its numbers are 0 or normal."""
    if kernel.function.__name__.endswith("with_integer_labels") and not mask[0]:
        return False
    tiny = np.finfo(dtype).tiny
    return all(np.size(y) and not ((np.abs(y) > 0) & (np.abs(y) < tiny)).any() for y in row)


def lost_in_the_largest_part(kernel: Kernel, row, dtype) -> float:
    """The error, in ulps, that half an ulp of xᵢ - max x causes in a divergence to which class i contributes most."""
    if kernel.function is not jce.kl_divergence_with_logits:
        return 0.0
    x, y = row
    parts = [weighted(p, abs(s - t)) for p, s, t in zip(softmax(x), surprisals(x), surprisals(y), strict=True)]
    depth = max(x) - x[parts.index(max(parts))] if any(parts) else 0
    with np.errstate(over="ignore"):
        return spacing(float(depth), dtype) / np.finfo(dtype).eps if depth else 0.0


def underflow(kernel: Kernel, row, dtype) -> float:
    """The error that a result may have since probabilities below the smallest normal number count as 0."""
    tiny = float(np.finfo(dtype).tiny)
    logits = [np.float64(x) for x, domain in zip(row, kernel.domains, strict=True) if domain == LOGIT]
    largest = max((np.max(np.abs(x), where=np.isfinite(x), initial=0) for x in logits), default=0)
    with np.errstate(over="ignore", invalid="ignore"):
        small = [np.exp(x - x.max() if kernel.has_classes else -np.abs(x)) for x in logits]
        small = [e / e.sum() if kernel.has_classes else e for e in small]
    return 1000 * tiny + largest * sum(np.max(q, where=q < tiny, initial=0) for q in small)


def within(kernel: Kernel, got, exact, scale, bar, dtype, row) -> None:
    # A formula that is infinite has no difference quotient.
    if abs(scale) <= np.finfo(dtype).max and not mp.isnan(exact):
        error = ulps(got, exact, scale, dtype)
        bar += underflow(kernel, row, dtype) / spacing(float(abs(scale)), dtype)
        assert error <= bar, f"{error:.3g} ulp, bar {bar}: got {got}, exact {mp.nstr(exact, 9)}, at {row}"


@pytest.mark.holds_nan
@each_function
@given(data=st.data())
@pytest.mark.in_turn(11, "wide")
def test_laws(kernel, data):
    n, axis, dtype, masked = data.draw(st.sampled_from(VARIANTS[:2] if short() else VARIANTS))
    strange = data.draw(st.booleans())
    x = data.draw(batches(kernel, n, dtype, strange))
    mask = data.draw(arrays(bool, (BATCH, n))) if masked and kernel.has_classes else np.ones((BATCH, n), bool)
    with jax.enable_x64(dtype == "float64"):
        value, gradient, by_row = jax.tree.map(np.asarray, program(kernel, axis, masked)(mask, x))
    # A batch equals a loop over its rows, and forward mode equals reverse mode.
    alike(by_row[0], value, value.dtype, *x, mask, scale=n if kernel.value_scale else 0)
    # A derivative may be a difference of terms as large as these.
    terms = 1 + largest_finite(np.asarray(value, np.float64).reshape(BATCH, -1))
    for g, reverse, forward, difference in zip(gradient, *by_row[1:], kernel.gradient_scale, strict=False):
        scale = terms if difference else 0
        alike(reverse, g, dtype, *x, mask, scale=scale)
        alike(cast(forward, dtype), g, dtype, *x, mask, scale=scale)  # a tangent's dtype is the loss's
    # A masked entry has a derivative of 0, whatever it holds.
    if kernel.has_classes:
        for g in gradient:
            np.testing.assert_array_equal(g[~mask], np.zeros_like(g[~mask]))
    if strange:
        return
    assert not (kernel.never_negative and (value < 0).any())
    x = [np.asarray(y, value.dtype) for y in x]
    # A loss is NaN if and only if its logits have no distribution, and a gradient if and only if its loss is NaN.
    lost = np.isnan(value)
    np.testing.assert_array_equal(
        lost, np.broadcast_to(impossible(kernel, x, mask).reshape(-1, *[1] * (lost.ndim - 1)), lost.shape)
    )
    in_gradient = np.any([np.isnan(g.astype(np.float64)) for g in gradient], axis=0)
    np.testing.assert_array_equal(in_gradient.any(1) if kernel.has_classes else in_gradient, lost)
    if dtype in ("float32", "float64"):
        judge(kernel, x, mask, value, gradient, value.dtype)


@pytest.mark.holds_nan
@given(data=st.data())
@pytest.mark.slow
def test_labels(data):
    """A label's loss is that of label 0 after the classes are rolled. Only labels outside [0, n) are NaN."""
    x = data.draw(arrays(np.float64, (BATCH, 4), elements=st.floats(-90, 90))).astype(np.float32)
    labels = data.draw(arrays(np.int32, BATCH, elements=st.integers(-5, 8) | st.integers(-(2**31), 2**31 - 1)))
    value, gradient = labelled()(labels, x)
    none = (labels < 0) | (labels >= 4)
    np.testing.assert_array_equal(np.isnan(value), none)
    np.testing.assert_array_equal(np.isnan(gradient).all(1), none)
    rolled = np.stack([np.roll(row, -y) for row, y in zip(x, labels % 4, strict=True)])
    expected = labelled()(np.zeros(BATCH, np.int32), rolled)
    np.testing.assert_allclose(value[~none], expected[0][~none], rtol=1e-6)
    back = np.stack([np.roll(row, y) for row, y in zip(expected[1], labels % 4, strict=True)])
    np.testing.assert_allclose(gradient[~none], back[~none], rtol=1e-6)


@functools.cache
def labelled():
    function = jce.cross_entropy_with_integer_labels
    return jax.jit(lambda y, x: (function(y, x), jax.grad(lambda x: function(y, x).sum())(x)))


# Nestings


SCAN_KEEPS_RULES = jax.__version_info__ >= (0, 12)  # before, only with a checkpoint: see tests/test_plain_jax.py


def scanned(f):
    def body(row):
        return f(*row)

    return lambda *x: jax.lax.map(body if SCAN_KEEPS_RULES else jax.checkpoint(body), x)


TRANSFORMATIONS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": jax.vmap,
    "scan": scanned,
    "cond": lambda f: (
        lambda *x: jax.lax.cond(jnp.isfinite(x[0]).any(), f, lambda *x: jax.tree.map(jnp.zeros_like, f(*x)), *x)
    ),
    "linearize": lambda f: lambda *x: jax.linearize(f, *x)[0],
    "vjp": lambda f: lambda *x: jax.vjp(f, *x)[0],
}
MODES = {
    "forward over reverse": lambda f, x, t: jax.jvp(jax.grad(f, tuple(range(len(x)))), x, t)[1],
    "reverse over forward": lambda f, x, t: jax.grad(lambda *x: jax.jvp(f, x, t)[1], tuple(range(len(x))))(*x),
    "reverse over reverse": lambda f, x, t: jax.grad(
        lambda *x: sum(map(jnp.vdot, jax.grad(f, tuple(range(len(x))))(*x), t)), tuple(range(len(x)))
    )(*x),
}


@functools.cache
def nested(kernel: Kernel, names: tuple[str, ...], mode: str):
    """A batch's Hessian-vector product in one mode, through transformations that are named from the inside out."""
    function = kernel.function
    for name in names:
        function = TRANSFORMATIONS[name](function)
    return jax.jit(lambda x, t: MODES[mode](lambda *x: function(*x).sum(), x, t))


@each_function
@settings(max_examples=settings.default.max_examples // 12)
@given(data=st.data())
@pytest.mark.in_turn(8, "wide")
def test_nestings(kernel, data):
    """Under three nested transformations and in any mode, the Hessian-vector product is that of the plain call."""
    names = tuple(data.draw(st.permutations(sorted(TRANSFORMATIONS)))[:3])
    if "scan" in names and not SCAN_KEEPS_RULES:
        names = tuple(name for name in names if name not in ("linearize", "vjp"))
    mode = data.draw(st.sampled_from(sorted(MODES)))
    # At the boundary a derivative is infinite, and the difference of two infinities is NaN.
    edge = [] if jax.config.jax_debug_nans else [0.0, 1.0]
    p, logits = st.sampled_from([0.5, *edge]) | st.floats(2**-6, 1 - 2**-6), st.floats(-9, 9)

    def array(elements):
        return arrays(np.float64, (2, 2, 3), elements=elements).map(np.float32)

    x = data.draw(st.tuples(*(array(logits if domain == LOGIT else p) for domain in kernel.domains)))
    t = data.draw(st.tuples(*(array(st.sampled_from([0.0, 1.0, -0.5])) for _ in x)))
    got, expected = nested(kernel, names, mode)(x, t), nested(kernel, (), "forward over reverse")(x, t)
    for g, e in zip(got, expected, strict=True):
        finite = np.isfinite(e)
        assert not np.isfinite(g)[~finite].any()  # an infinity, or in one nesting the difference of two infinities
        np.testing.assert_allclose(np.asarray(g)[finite], np.asarray(e)[finite], rtol=1e-4, atol=1e-5)
