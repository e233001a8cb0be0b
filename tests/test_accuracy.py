"""Values, first derivatives and Hessian-vector products agree with the formula in mpmath, within the error bounds."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from tests.kernels import (
    HEADS,
    KERNELS,
    LOGIT,
    WITH_CLASSES,
    Kernel,
    each_kernel,
    each_with_classes,
    easy,
    gradient,
    label,
)
from tests.optimized_jit import optimized_jit
from tests.oracle import conditioning, distributions, hessian, interior, partial, precision, spacing, to_mp, ulps

SLOW = [pytest.mark.slow]
each_dtype = pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=SLOW)])


def sampled(kernel: Kernel, rng, shape, dtype) -> tuple[list[str], list[np.ndarray]]:
    """The regime of each distribution, and the arguments. All regimes are in one array, so it compiles only once."""
    samples = kernel.sample(rng, shape, dtype)
    if len(samples) > 15 and kernel.has_classes:  # to keep the total number of rows
        samples = {name: [x[: max(1, len(x) // 3)] for x in arrays] for name, arrays in samples.items()}
    arguments = [np.concatenate(arrays) for arrays in zip(*samples.values(), strict=True)]
    return list(np.repeat(list(samples), len(distributions(kernel, *arguments)) // len(samples))), arguments


class Judge:
    """Collects results that miss their error bar. It skips results below the normal range, which XLA flushes to 0."""

    def __init__(self, dtype):
        self.dtype, self.misses = dtype, []

    def __call__(self, got, exact, scale, bar, *where):
        if np.finfo(self.dtype).tiny <= abs(scale) <= np.finfo(self.dtype).max:
            error = ulps(got, exact, scale, self.dtype)
            if not error <= bar:
                self.misses.append(f"{error:.3g} ulp, bar {bar}: got {got}, exact {mp.nstr(exact, 9)}, at {where}")

    def finish(self):
        assert not self.misses, f"{len(self.misses)} misses, such as\n" + "\n".join(self.misses[:5])


# Few classes, and many. For each kernel, one of the two is quick.
SHAPES = [
    pytest.param(kernel, shape, id=f"{label(kernel)}-{shape[1]}", marks=SLOW if (i + j) % 2 else [])
    for i, kernel in enumerate(KERNELS)
    for j, shape in enumerate([(4, 33), (2, 130)])
]


@each_dtype
@pytest.mark.parametrize(("kernel", "shape"), SHAPES)
def test_values(kernel, shape, dtype, rng):
    regimes, arguments = sampled(kernel, rng, shape, dtype)
    with jax.enable_x64(dtype == np.float64):
        value = np.asarray(optimized_jit(kernel.function)(*arguments))
    assert value.dtype == dtype
    judge = Judge(dtype)
    for regime, row, got in zip(regimes, distributions(kernel, *arguments), value.ravel(), strict=True):
        with precision(kernel, row):
            exact = kernel.formula(*to_mp(row))
            scale = kernel.value_scale(*to_mp(row)) if kernel.value_scale else exact
            judge(got, exact, scale, kernel.value_bar + conditioning(kernel, to_mp(row), dtype), regime, row)
        assert got >= 0 or not kernel.never_negative, (regime, row)
    judge.finish()


@each_dtype
@each_kernel
def test_first_derivatives(kernel, dtype, rng):
    regimes, arguments = sampled(kernel, rng, (4, 8), dtype)
    with jax.enable_x64(dtype == np.float64):
        gradients = jax.tree.map(np.asarray, optimized_jit(gradient(kernel))(*arguments))
    judge = Judge(dtype)
    pairs = zip(distributions(kernel, *arguments), distributions(kernel, *gradients), strict=True)
    for regime, (row, got) in zip(regimes, pairs, strict=True):
        with precision(kernel, row):
            exact_row = to_mp(row)
            scales = [scale and scale(*exact_row) for scale in kernel.gradient_scale]
            for i, j, x in interior(kernel, exact_row):
                exact = partial(kernel.formula, exact_row, (i, j, x))
                scale = scales[i][j] if scales[i] else exact
                bar = kernel.gradient_bar[i] + conditioning(kernel, exact_row, dtype, j)
                judge(np.atleast_1d(got[i])[j], exact, scale, bar, regime, kernel.arguments[i], row)
    judge.finish()


@each_dtype
@each_kernel
def test_hessian_vector_products(kernel, dtype, rng):
    regimes, arguments = sampled(kernel, rng, (3, 3), dtype)
    # Each direction is proportional to its entry, with either sign. So every term counts, and terms cancel.
    tangents = [(x * rng.uniform(-1, 1, x.shape)).astype(dtype) for x in arguments]
    for x, t, (_, highest) in zip(arguments, tangents, kernel.domains, strict=True):
        t[~np.isfinite(x) | (x == highest)] = 0
    with jax.enable_x64(dtype == np.float64):
        _, hvp = optimized_jit(lambda x, t: jax.jvp(gradient(kernel), x, t))(tuple(arguments), tuple(tangents))
        hvp = jax.tree.map(np.asarray, hvp)
    judge = Judge(dtype)
    rows = (distributions(kernel, *x) for x in (arguments, tangents, hvp))
    for regime, row, direction, got in zip(regimes, *rows, strict=True):
        with precision(kernel, row):
            exact_row, inside = to_mp(row), list(interior(kernel, to_mp(row)))
            along = [mp.mpf(float(np.atleast_1d(direction[i])[j])) for i, j, _ in inside]
            scales = kernel.hvp_scale(*exact_row, *to_mp(direction)) if kernel.hvp_scale else None
            for (i, j, _), partials in zip(inside, hessian(kernel.formula, exact_row, inside), strict=True):
                terms = [x * t for x, t in zip(partials, along, strict=True)]
                exact, scale = sum(terms), sum(abs(term) for term in terms)
                if scales:
                    scale = scales[i][j] if kernel.has_classes else scales[i]
                bar = kernel.hvp_bar + conditioning(kernel, exact_row, dtype, j)
                # A token's share of a mean is smaller than the scale, and may be below the normal range.
                if kernel in HEADS and 0 < scale < 2**16 * np.finfo(dtype).tiny:
                    continue
                judge(np.atleast_1d(got[i])[j], exact, scale, bar, regime, kernel.arguments[i], row)
    judge.finish()


def shift(x, d, t):
    """x + t d, for numbers or lists."""
    return [a + t * b for a, b in zip(x, d, strict=True)] if isinstance(x, list) else x + t * d


@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_third_derivative(kernel, rng):
    """Along a direction, the derivative (forward over forward over reverse) agrees with the formula's to 1e-9."""
    arguments = easy(kernel, rng, (4, 3), np.float64)
    direction = [x * rng.uniform(-0.5, 0.5, x.shape) for x in arguments]

    def along(t):
        return kernel.function(*(x + t * d for x, d in zip(arguments, direction, strict=True)))

    with jax.enable_x64(True):
        third = jax.jit(jax.jacfwd(jax.jacfwd(jax.jacrev(along))))(0.0)
    rows = zip(distributions(kernel, *arguments), distributions(kernel, *direction), strict=True)
    for (row, step), got in zip(rows, np.ravel(third), strict=True):
        x, d = to_mp(row), to_mp(step)

        def exact_along(t, x=x, d=d):
            return kernel.formula(*(shift(a, b, t) for a, b in zip(x, d, strict=True)))

        with mp.workprec(300):
            np.testing.assert_allclose(got, float(mp.diff(exact_along, 0, 3)), rtol=1e-9)


@each_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.one_for_each("kernel")
@pytest.mark.in_turn(9, "wide")
def test_half_precision(kernel, dtype, rng):
    """Half-precision arguments give the value of the same numbers in float32, and the float32 gradients, rounded."""
    _, arguments = sampled(kernel, rng, (12, 8), np.float32)
    largest = float(jnp.finfo(dtype).max)
    half = [jnp.asarray(np.where(np.isinf(x), x, np.clip(x, -largest, largest)), dtype) for x in arguments]
    exact = [x.astype(np.float32) for x in half]

    @jax.jit
    def value_and_gradient(*x):
        return kernel.function(*x), gradient(kernel)(*x)

    value, got = value_and_gradient(*half)
    exact_value, expected = value_and_gradient(*exact)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, exact_value, rtol=4 * np.finfo(np.float32).eps)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == half[0].dtype
        g, e = np.asarray(g, np.float32), np.asarray(e)
        beyond = np.abs(e) >= float(jnp.finfo(dtype).max)
        np.testing.assert_array_equal(g[beyond], np.copysign(np.inf, e[beyond]))
        g, e = g[~beyond], e[~beyond]
        np.testing.assert_array_less(np.abs(g - e), 0.51 * spacing(e, dtype))


OF_PROBABILITIES = [kernel for kernel in WITH_CLASSES if LOGIT not in kernel.domains]


@each_dtype
@pytest.mark.parametrize("kernel", OF_PROBABILITIES, ids=label)
def test_parts_of_a_distribution(kernel, dtype, rng):
    """`where` keeps one class or several, with p and q of every size. Errors are relative to the classes' own terms."""
    rows, n = 400, 6
    p, q = 10 ** rng.uniform(-12, 0, (2, rows, n))
    q = np.where(np.arange(rows)[:, None] % 4, q, p * 10 ** rng.uniform(-1, 1, (rows, n)))
    p, q = p.astype(dtype), q.astype(dtype)
    kept = rng.permuted(np.arange(n) <= np.arange(rows)[:, None] % n, axis=1)
    arguments = [np.where(kept, x, np.nan) for x in (p, q)[: len(kernel.arguments)]]
    with jax.enable_x64(dtype == np.float64):
        value = np.asarray(optimized_jit(kernel.function)(*arguments, where=kept))
    judge = Judge(dtype)
    for i, got in enumerate(value):
        row = to_mp([x[i, kept[i]] for x in arguments])
        with mp.workprec(300):
            each = [kernel.formula(*([x] for x in of_class)) for of_class in zip(*row, strict=True)]
            judge(got, sum(each), sum(map(abs, each)), kernel.value_bar, row)
    judge.finish()


FUSED = ("entropy", "cross_entropy", "cross_entropy_with_logits")  # XLA fuses all of their terms into the sum


@pytest.mark.parametrize(
    ("kernel", "n"),
    [
        pytest.param(kernel, n, id=f"{label(kernel)}-{n}", marks=[] if n == 4096 and kernel.name in FUSED else SLOW)
        for kernel in WITH_CLASSES
        for n in (4096, 30_000)
    ],
)
@pytest.mark.in_turn(4)
def test_a_batch_of_one_row(kernel, n):
    """Values and tangents of a batch are as accurate as those of its row alone, however the batch is written.

    All terms are equal, so a sum in sequence would round all of them in the same direction.
    """
    signs = np.where(np.arange(n) % 2, -1, 1)
    logits, probabilities = (np.full(n, 0.3), 0.3 * signs), (np.full(n, 1 / n), np.full(n, 0.5 / n))
    pairs = zip(kernel.domains, logits, probabilities, strict=False)
    row = tuple(np.float32(x if domain == LOGIT else p) for domain, x, p in pairs)
    batch = tuple(x[None] for x in row)

    def run(row, batch):
        middle, columns = tuple(x[:, None] for x in batch), tuple(x.T for x in batch)
        ways = [(kernel.function, batch), (jax.vmap(kernel.function), batch), (kernel.function, middle)]
        ways += [(lambda *x: kernel.function(*x, axis=0), columns)]
        return [[jnp.ravel(r)[0] for r in jax.jvp(f, x, x)] for f, x in [(kernel.function, row), *ways]]

    alone, *batches = (np.array(x) for x in optimized_jit(run)(row, batch))
    with jax.enable_x64(True):
        exact = np.array(run(*jax.tree.map(np.float64, (row, batch)))[0])
    bar = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(exact), 1)
    for got in batches:  # this CPU runs an accelerator's sum of several results in sequence, also for a row alone
        assert (np.abs(got - exact) <= bar + np.abs(alone - exact)).all()


@each_with_classes
@pytest.mark.slow
def test_a_hundred_thousand_classes(kernel, rng):
    samples = kernel.sample(rng, (1, 100_000), np.float32)
    hard = next(name for name in ("near 0.001", "ahead by 10", "one-hot, ahead by 10") if name in samples)
    (row,) = distributions(kernel, *samples[hard])
    with mp.workprec(100):
        exact = kernel.formula(*to_mp(row))
        scale = kernel.value_scale(*to_mp(row)) if kernel.value_scale else exact
        bar = kernel.value_bar + conditioning(kernel, to_mp(row), np.float32)
    assert ulps(optimized_jit(kernel.function)(*row), exact, scale, np.float32) <= bar
