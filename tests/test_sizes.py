"""Every edge case of the table in large arrays, for which XLA compiles other programs on a CPU.

If an array has about 4,096 numbers or more, its maximum drops a NaN, and so do `maximum` and `minimum` inside its sums
(`test_workarounds.py`). Rows longer than `LONGEST_ROW` are summed in blocks. Therefore each edge case is tested in a
batch of many rows, and in a batch of long rows. Which operations drop a NaN is XLA's choice, and may change. Therefore
each edge case is also tested in a small batch, with maxima and minima of jax.numpy that drop every NaN.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from jce._jax.classes import LONGEST_ROW
from tests.kernels import KERNELS, OF_LOGITS, WITH_CLASSES, Corner, Kernel, easy, label, total
from tests.optimized_jit import optimized_jit


class Size(NamedTuple):
    """The shape of a batch. No other test may use the small shape, because JAX's caches keep traces of a shape."""

    rows: int
    classes: int
    drops_nan: bool = False  # whether each maximum and minimum drops a NaN, not only XLA's

    @property
    def jit(self) -> Callable:
        """Only large arrays need XLA's optimized code."""
        return jax.jit if self.drops_nan else optimized_jit


SIZES = {
    "small": Size(29, 11, drops_nan=True),
    "many rows": Size(1_200, 7),
    "long rows": Size(29, LONGEST_ROW + 132),
}
BATCHES = [(size, "float32") for size in SIZES]
BATCHES += [("many rows", "float64"), ("long rows", "float64"), ("many rows", "bfloat16"), ("many rows", "float16")]


def each_row_and_size(kernels, every: int = 1):
    """Each row of the table in each size and dtype.

    In float32, one of the two large sizes, in turn, is quick for every n-th row and wide for the others.
    """

    def mark(k, size, dtype):
        if (size, dtype) != (("many rows", "long rows")[k % 2], "float32"):
            return [pytest.mark.slow]
        return [pytest.mark.wide] if k // 2 % every else []

    cases = [
        pytest.param(kernel, SIZES[size], dtype, id=f"{size}-{dtype}-{label(kernel)}", marks=mark(k, size, dtype))
        for k, kernel in enumerate(kernels)
        for size, dtype in BATCHES
    ]
    return pytest.mark.parametrize(("kernel", "size", "dtype"), cases)


each_dtype = pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float64", "bfloat16", "float16"))]
)
pytestmark = [pytest.mark.holds_nan, pytest.mark.needs_jit]


# A maximum that drops a NaN


def of_two(operation: Callable) -> Callable:
    def function(a, b):
        a, b = jnp.asarray(a), jnp.asarray(b)
        result = operation(a, b)
        if not jnp.issubdtype(result.dtype, jnp.floating):
            return result
        a, b = (jnp.broadcast_to(x, result.shape).astype(result.dtype) for x in (a, b))
        return jnp.where(jnp.isnan(a), b, jnp.where(jnp.isnan(b), a, result))

    return function


def of_axis(x, axis=None, **options):
    known = jnp.where(jnp.isnan(x), jnp.full_like(x, -jnp.inf), x) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return MAXIMUM_OF_AXIS(known, axis, **options)


MAXIMUM_OF_AXIS = jnp.max
DROPPING = {"maximum": of_two(jnp.maximum), "minimum": of_two(jnp.minimum), "max": of_axis}


@pytest.fixture
def dropping(size, request):
    """Replace maxima and minima, except under `--as-on`: only the sums of a CPU drop a NaN."""
    drops = size.drops_nan and not request.config.option.as_on
    with mock.patch.multiple(jnp, **DROPPING) if drops else contextlib.nullcontext():
        yield


# Edge cases in a batch


def is_exact(x, dtype) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(np.asarray(x, dtype).astype(np.float64), x, equal_nan=True)


def corners_of(kernel: Kernel, dtype) -> list[Corner]:
    """The edge cases that are the same in a longer row of this dtype.

    A row is padded with absent classes. If the function has no absent class, a row is padded with logits of 0, and then
    only edge cases with a NaN or +∞ stay the same.
    """
    corners = [c for c in kernel.corners if all(is_exact(x, dtype) for x in c.arguments)]
    if kernel.has_classes and None in kernel.absent:
        corners = [c for c in corners if np.isnan(c.value) and np.max(c.arguments) != -np.inf]
    return corners


def places(corner: Corner, n: int) -> np.ndarray:
    """The indices of an edge case's classes in a row of n classes. The first, which may be the label, has index 0."""
    width = len(corner.arguments[0])
    return np.arange(width) * (n - 1) // (width - 1)


def in_a_row(kernel: Kernel, corner: Corner, n: int) -> list[np.ndarray]:
    """The arguments of an edge case, each as a row of n classes. The additional classes are absent."""
    if not kernel.has_classes:
        return [np.asarray(x) for x in corner.arguments]
    rows = [np.full(n, 0.0 if a is None else a) for a, _ in zip(kernel.absent, corner.arguments, strict=False)]
    for row, x in zip(rows, corner.arguments, strict=True):
        row[places(corner, n)] = x
    return rows


def of_corner(kernel: Kernel, corner: Corner, x: np.ndarray) -> np.ndarray:
    """The numbers of a row x that belong to the classes of an edge case."""
    return x[places(corner, len(x))] if kernel.has_classes else x


def ordinary(kernel: Kernel, rng, size: Size, dtype) -> list[np.ndarray]:
    """A batch without edge cases. For an elementwise function it has as many numbers, but at most 20,000.

    Rows repeat after 29 rows, since sampling more takes longer than the tests.
    """
    rows = easy(kernel, rng, (min(size.rows, 29), size.classes))
    arguments = [np.resize(x, (size.rows, size.classes)) for x in rows]
    if not kernel.has_classes:
        arguments = [x.ravel()[:20_000] for x in arguments]
    return [x.astype(dtype) for x in arguments]


def agrees(got, expected, dtype, what=""):
    exact = dtype in ("float32", "float64")
    np.testing.assert_allclose(
        np.float64(got), expected, rtol=2e-5 if exact else 2e-2, atol=1e-30 if exact else 1e-3, err_msg=what
    )


@each_row_and_size(KERNELS)
def test_each_row(kernel, size, dtype, rng, dropping):
    """Values and derivatives in both modes. Some rows are edge cases, which don't change the other rows."""
    corners, without = corners_of(kernel, dtype), ordinary(kernel, rng, size, dtype)
    batch, positions = [x.copy() for x in without], tuple(range(len(without)))
    at = range(1, 1 + len(corners))
    for row, corner in zip(at, corners, strict=True):
        for x, numbers in zip(batch, in_a_row(kernel, corner, size.classes), strict=True):
            x[row] = numbers

    @size.jit
    def program(arguments, along):
        values, tangents = jax.jvp(kernel.function, tuple(arguments), tuple(along))
        return values, tangents, jax.grad(total(kernel), positions)(*arguments)

    def derivatives(arguments, along):
        return jax.tree.map(np.asarray, program(arguments, along))

    with jax.enable_x64(dtype == "float64"):
        values, _, gradients = derivatives(batch, without)
        for row, corner in zip(at, corners, strict=True):
            agrees(values[row], corner.value, dtype)
            for argument, g, expected in zip(kernel.arguments, gradients, corner.gradient, strict=True):
                agrees(of_corner(kernel, corner, g[row]), expected, dtype, argument)
        others = np.delete(np.arange(len(values)), at)
        for got, plain in zip([values, *gradients], jax.tree.leaves(derivatives(without, without)[::2]), strict=True):
            agrees(got[others], np.float64(plain[others]), dtype)

        width = max(np.size(corner.arguments[0]) for corner in corners)
        for i, k in np.ndindex(len(batch), width):
            along = [np.zeros_like(x) for x in batch]
            chosen = [(row, c) for row, c in zip(at, corners, strict=True) if k < np.size(c.arguments[0])]
            for row, corner in chosen:
                along[i][(row, places(corner, size.classes)[k]) if kernel.has_classes else row] = 1
            _, tangents, _ = derivatives(batch, along)
            for row, corner in chosen:
                agrees(tangents[row], np.ravel(corner.gradient[i])[k], dtype)
            assert not tangents[others].any()


@each_row_and_size(KERNELS, every=4)
def test_reductions_of_results(kernel, size, dtype, rng, dropping):
    """A mean over the batch is NaN if one row is NaN. The norm of a gradient is NaN if one entry is NaN."""
    without, positions = ordinary(kernel, rng, size, dtype), tuple(range(len(kernel.arguments)))

    @size.jit
    def reduced(*arguments):
        gradients = jax.grad(total(kernel), positions)(*arguments)
        return kernel.function(*arguments).mean(), [jnp.square(g.astype(jnp.float32)).sum() for g in gradients]

    with jax.enable_x64(dtype == "float64"):
        for corner in corners_of(kernel, dtype):
            batch = [x.copy() for x in without]
            for x, numbers in zip(batch, in_a_row(kernel, corner, size.classes), strict=True):
                x[7] = numbers
            mean, norms = reduced(*batch)
            assert np.isnan(mean) == np.isnan(corner.value)
            for argument, norm, gradient in zip(kernel.arguments, norms, corner.gradient, strict=True):
                assert np.isnan(norm) == np.isnan(gradient).any(), argument


@each_row_and_size(OF_LOGITS, every=2)
def test_a_hessian_vector_product_of_logits(kernel, size, dtype, rng, dropping):
    """A Hessian-vector product is NaN in all classes of a row with a NaN or +∞ logit, and in no other row."""
    arguments = ordinary(kernel, rng, size, dtype)
    i = next(i for i, name in enumerate(kernel.arguments) if "logits" in name)
    broken = {1: (0, np.nan), 2: (size.classes // 2, np.nan), 3: (0, np.inf), 4: (size.classes - 1, np.inf)}
    for row, (k, number) in broken.items():
        arguments[i][row, k] = number

    @size.jit
    def product(x, along):
        def gradient(x):
            return jax.grad(lambda x: total(kernel)(*arguments[:i], x, *arguments[i + 1 :]))(x)

        return jax.jvp(gradient, (x,), (along,))[1]

    with jax.enable_x64(dtype == "float64"):
        got = np.isnan(np.float64(product(arguments[i], rng.standard_normal(arguments[i].shape).astype(dtype))))
    assert got[[*broken]].all()
    assert not np.delete(got, [*broken], 0).any()


@each_row_and_size(WITH_CLASSES, every=3)
def test_a_masked_class(kernel, size, dtype, rng, dropping):
    """A NaN in a class that `where` masks has no effect: a finite number in its place gives the same bits."""
    masked = size.classes // 2
    plain = ordinary(kernel, rng, size, dtype)
    broken = [x.copy() for x in plain]
    for x in broken:
        x[:, masked] = np.nan
    kept, positions = np.arange(size.classes) != masked, tuple(range(len(plain)))
    program = size.jit(jax.value_and_grad(lambda *x: kernel.function(*x, where=kept).sum(), positions))
    with jax.enable_x64(dtype == "float64"):
        for got, expected in zip(jax.tree.leaves(program(*broken)), jax.tree.leaves(program(*plain)), strict=True):
            np.testing.assert_array_equal(got, expected)
            assert not np.isnan(np.float64(got)).any()


# Heads: a NaN in one class reaches every token. A NaN in one token reaches no other token.


TOKENS, CHUNK, CLASSES, WIDTH = 240, 80, 65, 5
LABELS = np.arange(TOKENS) % 3


# Functions of (hidden states, a head, a bias) that return one number per token
LISTS = {"label_probs": np.full((TOKENS, 2), 0.4, np.float32), "tail": True}
OF_TOKENS: dict[str, Callable] = {
    "labels": lambda h, w, b, **k: jce.linear_cross_entropy(LABELS, h, w, b, reduction="none", **k),
    "smoothed": lambda h, w, b, **k: jce.linear_cross_entropy(
        LABELS, h, w, b, reduction="none", label_smoothing=0.1, z_loss=0.1, **k
    ),
    "at a temperature": lambda h, w, b, **k: jce.linear_cross_entropy(
        LABELS, h, w, b, reduction="none", temperature=1.5, logit_soft_cap=9.0, **k
    ),
    "lists": lambda h, w, b, **k: jce.linear_cross_entropy(
        np.stack([LABELS, LABELS + 1], 1), h, w, b, reduction="none", **LISTS, **k
    ),
    "log-probabilities": lambda h, w, b, **k: jce.linear_log_probs(LABELS, h, w, b, **k).log_prob,
    "entropies": lambda h, w, b, **k: jce.linear_log_probs(LABELS, h, w, b, **k).entropy,
    "a divergence": lambda h, w, b, **k: jce.linear_kl_divergence(
        jce.Linear(2 * h, w, b), jce.Linear(h, w, b), reduction="none", **k
    ),
    "a map": lambda h, w, b, **k: jce.linear_map(
        jce.cross_entropy_with_integer_labels, LABELS, jce.Linear(h, w, b), **k
    ),
    "a function": lambda h, w, b, **k: jce.linear_cross_entropy(LABELS, h, function_of(w, b), reduction="none", **k),
}


def function_of(w, b) -> Callable:
    dtype = w.dtype if w.dtype.itemsize >= 4 else jnp.float32
    return lambda h: jnp.matmul(h, w.T, preferred_element_type=dtype) + b.astype(dtype)[None]


each_head = pytest.mark.parametrize("name", OF_TOKENS)


def arguments_of_head(rng, dtype):
    return [rng.standard_normal(shape).astype(dtype) for shape in ((TOKENS, WIDTH), (CLASSES, WIDTH), (CLASSES,))]


@each_head
@each_dtype
@pytest.mark.in_turn(3, "wide")
def test_a_nan_in_a_head(name, dtype, rng):
    """A NaN in the head or bias makes all results NaN. A NaN in a hidden state affects that token and the mean.

    The results are the losses, their mean, and the mean's gradients.
    """

    def mean(*arguments):
        return OF_TOKENS[name](*arguments, chunk_size=CHUNK).mean()

    @optimized_jit
    def program(*arguments):
        losses = OF_TOKENS[name](*arguments, chunk_size=CHUNK)
        return losses, jax.jvp(mean, arguments, arguments), jax.value_and_grad(mean, (0, 1, 2))(*arguments)

    def is_nan(argument, at):
        """Whether losses, means (one per mode of differentiation) and gradients are NaN if an argument has one NaN."""
        arguments = arguments_of_head(rng, dtype)
        arguments[argument][at] = np.nan
        losses, pushed, (value, gradients) = jax.tree.map(lambda x: np.isnan(np.float64(x)), program(*arguments))
        return losses, (*pushed, value), gradients

    with jax.enable_x64(dtype == "float64"):
        for argument, at in ((1, (0, 2)), (1, (CLASSES - 2, 2)), (2, 0), (2, CLASSES - 2)):
            losses, of_mean, (of_hidden, of_head, of_bias) = is_nan(argument, at)
            for x in (losses, *of_mean, of_hidden, of_bias, of_head[:, 2]):
                assert x.all(), (argument, at)
        losses, of_mean, (of_hidden, *_) = is_nan(0, (7, 2))
        assert all(of_mean)
        assert losses.nonzero()[0].tolist() == [7]
        assert of_hidden.any(-1).nonzero()[0].tolist() == [7]


# Classes split over devices


SPLIT = [kernel for kernel in OF_LOGITS if kernel.name != "linear_map"]


@pytest.mark.parametrize("kernel", SPLIT, ids=label)
@pytest.mark.parametrize("by", ["XLA", "shard_map"])
@pytest.mark.one_for_each("kernel")
@pytest.mark.in_turn(3, "wide")
def test_classes_on_several_devices(kernel, by, rng):
    """A NaN or +∞ on one device makes its row's value and gradient NaN on all devices, and changes no other row."""
    arguments, rows = [x.astype(np.float32) for x in easy(kernel, rng, (1_200, 8))], range(1, 9)
    argument = kernel.arguments.index(next(name for name in kernel.arguments if "logits" in name))
    for row in rows:
        arguments[argument][row, row - 1] = np.nan if row % 2 else np.inf
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    positions = tuple(range(len(arguments)))

    def derivatives(function, *arguments):
        return function(*arguments), jax.grad(lambda *x: function(*x).sum(), positions)(*arguments)

    if by == "XLA":
        arguments = [jax.device_put(x, NamedSharding(mesh, P(None, "classes"))) for x in arguments]
        program = functools.partial(derivatives, kernel.function)
    else:
        function = functools.partial(kernel.function, axis_name="classes")
        program = jax.shard_map(
            functools.partial(derivatives, function),
            mesh=mesh,
            in_specs=(P(None, "classes"),) * len(arguments),
            out_specs=(P(), (P(None, "classes"),) * len(arguments)),
        )
    values, gradients = optimized_jit(program)(*arguments)
    for x in (values, *(np.isnan(g).all(-1) for g in gradients)):
        nan = np.isnan(x) if x.dtype != bool else x
        assert nan.nonzero()[0].tolist() == list(rows)
    for g in gradients:
        assert not np.isnan(np.delete(np.asarray(g), rows, 0)).any()


def test_a_head_on_a_mesh(rng):
    """A NaN in a class on one device makes every token NaN, on all devices."""
    mesh = jax.make_mesh((2, 4), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2)
    loss = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="tokens", class_axis="classes")
    h, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((TOKENS, WIDTH), (128, WIDTH), (128,)))
    b[100] = np.nan
    losses = optimized_jit(lambda h, w, b: loss(LABELS, h, w, b, reduction="none"))(h, w, b)
    gradients = optimized_jit(jax.grad(lambda h, w, b: loss(LABELS, h, w, b), (0, 1, 2)))(h, w, b)
    for x in (losses, *gradients):
        assert np.isnan(x).all()


@pytest.mark.parametrize("masked", [False, True], ids=["all classes", "masked classes"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_derivative_with_respect_to_the_smoothing_for_a_row_with_a_nan(size, masked, dropping):
    n = size.classes
    x = jnp.zeros((size.rows, n)).at[1, n // 2].set(jnp.nan)
    where = jnp.arange(n) < n - 2 if masked else None

    def loss(smoothing, x):
        return jce.cross_entropy_with_integer_labels(
            jnp.zeros(size.rows, int), x, label_smoothing=smoothing, where=where
        )

    is_nan = np.isnan(size.jit(jax.jacfwd(loss))(0.125, x))
    np.testing.assert_array_equal(is_nan, np.arange(size.rows) == 1)


# Numbers near the largest float


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["all classes", "masked classes"])
def test_smoothing_of_many_very_low_logits_stays_finite(size, masked):
    """Many masks use a very low number for -∞. The mean of such logits is finite even if their sum overflows."""
    low, n = -float(np.finfo(np.float32).max) / 4, size.classes
    x = jnp.zeros((size.rows, n)).at[:, 1:].set(low)
    where = jnp.arange(n) < n - 2 if masked else None
    mean, y = low * (1 - 1 / (n - 2 if masked else n)), jnp.zeros(size.rows, int)

    def loss(smoothing, x):
        return jce.cross_entropy_with_integer_labels(y, x, label_smoothing=smoothing, where=where)

    np.testing.assert_allclose(optimized_jit(loss)(0.125, x), np.full(size.rows, -mean / 8), rtol=1e-5)
    np.testing.assert_allclose(optimized_jit(jax.jacfwd(loss))(0.125, x), np.full(size.rows, -mean), rtol=1e-5)
    if not masked:
        of_head = jce.linear_cross_entropy(y[:4], jnp.ones((4, 1)), x[0][:, None], label_smoothing=0.125)
        np.testing.assert_allclose(of_head, -mean / 8, rtol=1e-5)
