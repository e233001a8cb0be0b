"""Functions are accurate also for inputs computed in the same program, which XLA may round differently in each pass.

A *maker* is a function, such as softmax, that computes an input in the tested program. The tests try every maker for
every public function, in all modes of differentiation. Results are compared with float64 results for the same inputs.
The error may be as large as for inputs from memory (other tests limit that error), plus the effects of two ulps in each
input and of the maker's own rounding error.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from jce._softmax.passes import Passes
from tests.kernels import (
    LOGIT,
    OF_LOGITS,
    TABLE,
    TAIL,
    WITH_CLASSES,
    Kernel,
    each_function,
    each_with_classes,
    label,
    modes,
    softmax,
    surprisals,
)
from tests.optimized_jit import optimized_jit
from tests.oracle import to_mp

pytestmark = pytest.mark.needs_jit

ROWS, CLASSES = 24, 5
MODES = ("gradient", "forward over reverse", "reverse over forward", "reverse over reverse", "third order")


# Makers: functions of numbers z [rows, n] with a spread of 20, and of a number w


def layer_norm(z, w):
    centered = z - z.mean(-1, keepdims=True)
    return 10 * w * centered / jnp.sqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-6)


def product(length: int, dtype=None) -> Callable:
    def maker(z, w):
        a, b = z[..., :length] * w, jnp.sin(jnp.arange(1, 1 + length * z.shape[-1], dtype=z.dtype)).reshape(length, -1)
        a, b = (x.astype(dtype or z.dtype) for x in (a, b))
        return jax.lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=z.dtype)

    return maker


LOGITS = {
    "x/3": lambda z, w: z / 3,
    "1.7 x": lambda z, w: z * jnp.asarray(1.7, z.dtype),
    "x t": lambda z, w: z * w,
    "x g + b": lambda z, w: z * jnp.linspace(0.7, 1.9, z.shape[-1], dtype=z.dtype)[None] + jnp.cos(z[..., :1]),
    "30 tanh(x/30)": lambda z, w: 30 * jnp.tanh(z / 30),
    "x²": lambda z, w: z * z / 7,
    "silu": lambda z, w: z * jax.nn.sigmoid(z),
    "layer norm": layer_norm,
    "product of 1": product(1),
    "product of 2": product(2),
    "product of 5": product(5),
    "bfloat16 product": product(2, jnp.bfloat16),
    "slices": lambda z, w: jnp.concatenate([z[..., 2:] * w, z[..., :2] / 3], -1),
}
# These makers get z/20
PROBABILITIES = {
    "softmax": lambda z, w: jax.nn.softmax(z * w),
    "sigmoid": lambda z, w: jax.nn.sigmoid(z * w),
    "p/Σp": lambda z, w: jnp.square(z) / jnp.square(z).sum(-1, keepdims=True),
    "exp(log p)": lambda z, w: jnp.exp(jax.nn.log_softmax(z * w)),
    "q(1 + ε)": lambda z, w: 0.99 * jax.nn.softmax(z) * (1 + 1e-3 * jnp.sin(z)),
    "0.9q + 0.1/n": lambda z, w: 0.9 * jax.nn.softmax(z) + 0.1 / z.shape[-1],
    "1 - q": lambda z, w: 1 - jax.nn.sigmoid(z) * w / 2,
}


def made(kernel: Kernel, makers, z, w):
    """Arguments, directions, and a cotangent per row."""
    # Log-probabilities must be so close that the quotient of the probabilities is finite.
    size = 5 if kernel.function is jce.sampled_kl_divergence else 1
    arguments = tuple(
        maker(x / (size if domain == LOGIT else 20), w)
        for maker, domain, x in zip(makers, kernel.domains, z, strict=False)
    )
    directions = tuple(x / 3 for x in z[::-1][: len(arguments)])
    return arguments, directions, z[0][..., 0] * w if kernel.has_classes else z[0] * w


def combinations(kernel: Kernel) -> list[tuple]:
    """Every maker in every argument, but not every combination of makers."""
    lists = [list((LOGITS if domain == LOGIT else PROBABILITIES).values()) for domain in kernel.domains]
    longest = max(map(len, lists))
    return [tuple(makers[(i + 4 * k) % len(makers)] for k, makers in enumerate(lists)) for i in range(longest)]


def raw(rng, classes=CLASSES):
    """Rows with a spread of 20 or 2. One row has two equal numbers."""
    z = 20 * rng.standard_normal((ROWS, classes))
    z[: ROWS // 4] /= 10
    z[ROWS // 4, 1] = z[ROWS // 4, 0]
    return z.astype(np.float32)


# The law


def results(kernel: Kernel) -> Callable:
    """Each row's value, and the derivatives of Σ c f in each mode, with the cotangent c."""

    def run(arguments, directions, cotangent):
        positions = tuple(range(len(arguments)))
        programs = modes(lambda *x: (cotangent * kernel.function(*x)).sum(), positions)
        out = {mode: programs[mode](arguments, directions) for mode in MODES}
        return {"value": kernel.function(*arguments)} | out | {"gradient": out["gradient"][1]}

    return run


def truth(kernel: Kernel, exactly: Callable, inputs, wanted) -> dict:
    """For each mode: float64's results, how far they move at most when the inputs move, and their scale.

    The inputs move one at a time, and the effects are added. The scale of a second derivative along a direction is the
    sum of the magnitudes for each component of the direction alone.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, inputs))
    off = [np.abs(x - y) for x, y in zip(leaves, jax.tree.leaves(wanted), strict=True)]
    steps = [2 * np.spacing(np.abs(np.float32(x))) + e for x, e in zip(leaves, off, strict=True)]
    shifts: list = [None]
    for i, x in enumerate(leaves):
        columns = range(x.shape[-1]) if x.ndim == 2 and kernel.has_classes else [slice(None)]
        shifts += [(i, j, sign) for j in columns for sign in (1, -1)]
    batch = []
    for shift in shifts:
        shifted = [x.copy() for x in leaves]
        if shift:
            i, j, sign = shift
            shifted[i][..., j] += sign * np.nan_to_num(steps[i])[..., j]
        batch.append(shifted)
    arguments, directions, cotangent = tree.unflatten(leaves)
    components = [(i, j) for i, j, sign in shifts[1:] if sign > 0 and i < len(arguments)]
    for i, j in components:
        alone = tuple(map(np.zeros_like, directions))
        alone[i][..., j] = directions[i][..., j]
        batch.append(jax.tree.leaves((arguments, alone, cotangent)))

    def split(x, second):
        x = np.asarray(x).reshape(len(batch), ROWS, *x.shape[1:])
        moved, terms = x[1 : len(shifts)], x[len(shifts) :]
        with np.errstate(invalid="ignore"):
            moved = np.nan_to_num(np.abs(moved - x[0]), nan=0).reshape(-1, 2, *x.shape[1:]).max(1).sum(0)
        return x[0], moved, np.abs(terms).sum(0) if second else np.abs(x[0])

    stacked = tree.unflatten([np.concatenate(xs) for xs in zip(*batch, strict=True)])
    return {
        mode: [split(x, mode in MODES[1:4]) for x in jax.tree.leaves(out)] for mode, out in exactly(*stacked).items()
    }


def entropy_hvp_terms(x, v):
    """The magnitudes of the terms of ∂²H/∂xᵢ∂xⱼ = pᵢpⱼ (log pᵢ + log pⱼ + 2H + 1) - δᵢⱼ pᵢ (log pᵢ + H + 1).

    For equal large classes the parenthesis may be 0 by coincidence.
    """
    p, surprisal = softmax(x), surprisals(x)
    entropy = sum(a * b for a, b in zip(p, surprisal, strict=True))
    of_all = sum(a * abs(t) * (1 + 2 * entropy + b) for a, b, t in zip(p, surprisal, v, strict=True))
    any_class = sum(a * abs(t) for a, t in zip(p, v, strict=True))
    terms = zip(p, surprisal, v, strict=True)
    return ([a * (of_all + b * any_class + (1 + entropy + b) * abs(t)) for a, b, t in terms],)


def known_scale(kernel: Kernel, arguments, directions, cotangent) -> list[np.ndarray]:
    """The scale of second derivatives whose entries are sums that cancel, from the table or from their terms."""
    scale = entropy_hvp_terms if kernel.function is jce.entropy_with_logits else kernel.hvp_scale
    if not (kernel.has_classes and scale):
        return []
    rows = zip(zip(*arguments, strict=True), zip(*directions, strict=True), strict=True)
    scales = [scale(*to_mp(row), *to_mp(direction)) for row, direction in rows]
    return [np.abs(cotangent)[:, None] * np.float64(x) for x in zip(*scales, strict=True)]


def holds(kernel: Kernel, makers, rng, from_memory: Callable, classes=CLASSES) -> None:
    z, w = (raw(rng, classes), raw(rng, classes)), np.float32(1.7)
    got = optimized_jit(lambda z, w: results(kernel)(*made(kernel, makers, z, w)))(z, w)
    with jax.disable_jit():
        inputs = jax.tree.map(np.asarray, made(kernel, makers, tuple(map(jnp.asarray, z)), jnp.asarray(w)))
    memory = from_memory(*inputs)
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, made(kernel, makers, tuple(map(jnp.float64, z)), jnp.float64(w)))
        expected = truth(kernel, from_memory, inputs, wanted)
    eps = np.finfo(np.float32).eps
    # The third derivative's terms are of the order of t² x, and some terms of the order of t² cancel.
    arguments, directions, cotangent = inputs
    size = (1 + sum(map(np.abs, arguments))) * sum(map(np.square, directions))
    third = 4 * eps * np.abs(cotangent if size.ndim == cotangent.ndim else cotangent[:, None]) * size
    third = third.max(-1, keepdims=True) if kernel.has_classes else third
    # Probabilities in a second derivative are only as exact as the row's largest logit.
    logits = [np.abs(x) for x, domain in zip(arguments, kernel.domains, strict=True) if domain == LOGIT]
    ulp_of_row = 2 * np.spacing(np.maximum(functools.reduce(np.maximum, logits, np.zeros_like(size)), 1))
    ulp_of_row = ulp_of_row.max(-1, keepdims=True) if kernel.has_classes else ulp_of_row
    known = known_scale(kernel, *inputs)
    for mode, truths in expected.items():
        arrays = [list(map(np.asarray, jax.tree.leaves(x[mode]))) for x in (got, memory)]
        for i, (g, m, (exact, moved, scale)) in enumerate(zip(*arrays, truths, strict=True)):
            scale = np.maximum(scale, known[i]) if known and mode in MODES[1:4] else scale
            assert not (np.isnan(g) & ~np.isnan(m)).any(), mode
            with np.errstate(invalid="ignore", over="ignore"):
                off = np.nan_to_num(np.abs(m - exact), posinf=0)
                off = off.max(-1, keepdims=True) if off.ndim == 2 else off
                # The weights p in KL have the error `ulp_of_row` too: Z comes from another pass, so Σ p isn't 1.
                by_weights = mode in MODES[1:] or kernel.function is jce.kl_divergence_with_logits
                relative = 16 * eps + (ulp_of_row if by_weights else 0)
                allowed = moved + 2 * off + relative * scale + (1e-36 if mode != "third order" else third)
                error = np.where((g == exact) | np.isnan(exact), 0, np.abs(g - exact))
            assert (error <= allowed).all(), (mode, g[error > allowed], exact[error > allowed])
    value = np.asarray(got["value"])
    if kernel.name not in ("kl_divergence", "log_probs_with_integer_labels"):
        assert not (value < 0).any()
    if kernel.has_classes:
        tiny = (expected["value"][0][0] < 1e-6) & (expected["value"][0][0] > 1e-30)
        for g, (exact, *_) in zip(jax.tree.leaves(got["gradient"]), expected["gradient"], strict=True):
            a, b = np.float64(g)[tiny], exact[tiny]
            length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            assert ((a * b).sum(-1) >= 0.999 * length)[length > 0].all()


def law(kernel: Kernel, rng, every: int) -> None:
    """Check every n-th combination of makers. Each function begins with a different one."""
    run = jax.jit(results(kernel))
    makers = combinations(kernel)
    for combination in makers[TABLE.index(kernel) % min(every, len(makers)) :: every]:
        holds(kernel, combination, rng, run)


@each_function
@pytest.mark.in_turn(11, "wide")
def test_inputs_made_in_the_same_program(kernel, rng):
    law(kernel, rng, 24)


@each_function
@pytest.mark.slow
def test_more_inputs_made_in_the_same_program(kernel, rng):
    law(kernel, rng, 6)


MANY = 96  # with this many classes, XLA sums in another order


@each_with_classes
@pytest.mark.slow
def test_many_classes_made_in_the_same_program(kernel, rng):
    makers = combinations(kernel)
    maker, run = makers[TABLE.index(kernel) % len(makers)], jax.jit(results(kernel))
    holds(kernel, maker, rng, run, MANY)


def mapped(f):
    return lambda *x: jax.lax.map(lambda row: f(*row), x)


CONSUMERS: dict[str, Callable] = {
    "weighted": lambda f: lambda *x: 0.3 * f(*x),
    "where": lambda f: lambda *x: jnp.where(jnp.asarray(f(*x)) > 0.5, f(*x), 0),
    "squared": lambda f: lambda *x: jnp.square(f(*x)),
    "log": lambda f: lambda *x: jnp.log1p(jnp.square(f(*x))),
    "difference": lambda f: lambda *x: jnp.square(f(*x) - f(*(y / 2 for y in x))),
    "checkpoint": lambda f: jax.checkpoint(lambda *x: jnp.square(f(*x))),
    "vmap": lambda f: jax.vmap(lambda *x: jnp.square(f(*x))),
    "scan": lambda f: mapped(jax.checkpoint(lambda *x: jnp.square(f(*x)))),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.slow
def test_results_used_in_the_same_program(consumer, rng):
    """Each consumer is tried with one function, and each function with a different maker."""
    k = list(CONSUMERS).index(consumer)
    kernel = WITH_CLASSES[k]
    consumed = dataclasses.replace(kernel, function=CONSUMERS[consumer](kernel.function))
    combination = combinations(kernel)[2 * k % len(combinations(kernel))]
    run = jax.jit(results(consumed))
    holds(consumed, combination, rng, run)


def forbidding(z, w):
    """Logits with classes that the program forbids: never the first one, and in some rows all others."""
    i, row = jnp.arange(z.shape[1])[None], jnp.arange(z.shape[0])[:, None]
    return jnp.where((i > 0) & ((i % 2 == 1) | (row % 4 == 0)), -jnp.inf, z * w)


ONE_ROW_OF_LOGITS = [
    kernel for kernel in WITH_CLASSES if kernel.domains == (LOGIT,) and kernel.note not in ("smoothed", TAIL)
]


@pytest.mark.parametrize("kernel", ONE_ROW_OF_LOGITS, ids=lambda kernel: kernel.name)
@pytest.mark.slow
def test_classes_forbidden_in_the_same_program(kernel, rng):
    z, w = np.concatenate([raw(rng), raw(rng)]), np.float32(1.7)
    t = rng.standard_normal(z.shape).astype(np.float32)

    def run(z, w, t):
        x = forbidding(z, w)
        total = lambda x: kernel.function(x).sum()  # noqa: E731
        return kernel.function(x), jax.grad(total)(x), jax.jvp(jax.grad(total), (x,), (t,))[1]

    got = optimized_jit(run)(z, w, t)
    with jax.enable_x64(True):
        expected = optimized_jit(run)(np.float64(z), np.float64(w), np.float64(t))
    for g, e in zip(got, expected, strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.in_turn(4)
def test_gradient_of_labels_if_another_class_dominates(platform, smoothing, rng):
    """The gradient at the dominant class is 1 minus the smoothing's share, accurate even for large logits."""
    z, y = np.float32(30 * rng.standard_normal((256, 6))), rng.integers(0, 6, 256, np.int32)

    @optimized_jit
    def run(z):
        x = z * z / 7
        losses = functools.partial(jce.cross_entropy_with_integer_labels, y, label_smoothing=smoothing)
        return x, jax.grad(lambda x: losses(x).sum())(x)

    x, g = map(np.asarray, run(z))
    first, second = np.sort(x)[:, :-3:-1].T
    rows = np.flatnonzero((first - second > 40) & (x.argmax(-1) != y))
    assert len(rows) > 100
    np.testing.assert_allclose(g[rows, x[rows].argmax(-1)], 1 - smoothing / 6, rtol=3e-7)


WAYS = [*itertools.product([None, "ours"], ["cpu", "accelerator"]), ("the user's", "cpu")]  # caps dense logits
OF_HEADS = [(function, *way) for function in ("cross-entropy", "log-probabilities") for way in WAYS]
OF_HEADS += [("divergence", None, "accelerator"), ("divergence", "ours", "cpu"), ("divergence", "the user's", "cpu")]


@pytest.mark.parametrize(("function", "cap", "platform"), OF_HEADS, indirect=["platform"])
@pytest.mark.slow
def test_heads_of_width_1(function, cap, platform, rng):
    """Logits h w, which XLA recomputes in each pass, and dense logits with a soft cap that the user computes."""
    h, w = 20 * rng.standard_normal((64, 1)), rng.standard_normal((5, 1))
    h, w, t = (x.astype(np.float32) for x in (h, w, rng.standard_normal((64, 1))))
    y = np.arange(64, dtype=np.int32) % 5

    def each(h, w):
        soft_cap = 30.0 if cap == "ours" else None
        if cap == "the user's":
            x = 30 * jnp.tanh(h @ w.T / 30)
            if function == "cross-entropy":
                return jce.cross_entropy_with_integer_labels(y, x)
            if function == "divergence":
                return jce.kl_divergence_with_logits(x, x[::-1])
            return -jce.cross_entropy_with_integer_labels(y, x) + jce.entropy_with_logits(x)
        if function == "cross-entropy":
            return jce.linear_cross_entropy(y, h, w, reduction="none", logit_soft_cap=soft_cap, chunk_size=16)
        if function == "divergence":
            p, q = jce.Linear(h, w, None, soft_cap), jce.Linear(h[::-1], w, None, soft_cap)
            return jce.linear_kl_divergence(p, q, reduction="none", chunk_size=16)
        return sum(jce.linear_log_probs(y, h, w, logit_soft_cap=soft_cap, chunk_size=16))

    def run(h, w, t):
        h, w = h / 3, w * h[0, 0] / 10
        total = lambda h, w: jnp.square(each(h, w)).sum()  # noqa: E731
        gradient = jax.grad(total, (0, 1))
        return each(h, w), gradient(h, w), jax.jvp(gradient, (h, w), (t / 3, w / 3))[1]

    got = jax.tree.leaves(optimized_jit(run)(h, w, t))
    with jax.enable_x64(True):
        expected = jax.tree.leaves(optimized_jit(run)(*map(np.float64, (h, w, t))))
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-3, atol=2e-5 * np.abs(e).max())


def test_products_that_round_to_1(rng):
    """If uv rounds to 1, 1 - uv must be 0. XLA's fused operation would give ±3e-8, and NaN in a logarithm."""
    u = rng.uniform(0.5, 2, 10_000).astype(np.float32)
    v = np.float32(1) / u
    u, v = u[u * v == 1], v[u * v == 1]
    one = np.ones_like(u)
    for function in (
        lambda u, v: jce.binary_entropy(u * v),
        lambda u, v: jce.binary_cross_entropy(u * v, one),
        lambda u, v: jce.binary_kl_divergence(u * v, one),
        lambda u, v: jce.binary_cross_entropy_with_logits(u * v, np.inf * one),
    ):
        np.testing.assert_array_equal(optimized_jit(function)(u, v), 0 * one)


def test_kl_divergence_for_many_quotients(platform, rng):
    """KL is accurate for all quotients q/p, however they are rounded, also for parts of a distribution."""
    ratios = np.concatenate([k + k * 2.0**-23 * np.arange(-50, 50) for k in (0.5, 1, 2, 3, 4, 8)])
    z = rng.uniform(1e-6, 1e-2, (100, ratios.size)).astype(np.float32)
    one = np.float32(1) + np.float32(2.0**-23)

    def made(z, one):
        return z * one, z * one * ratios.astype(z.dtype)[None] * one

    got = optimized_jit(lambda *x: jce.kl_divergence(*made(*x)))(z, one)
    p, q = made(np.float64(z), np.float64(one))
    exact, scale = (p * np.log(p / q)).sum(-1), (p * (1 + np.abs(np.log(p / q)))).sum(-1)
    np.testing.assert_array_less(np.abs(got - exact), 8 * np.finfo(np.float32).eps * scale)


@pytest.fixture
def other_rounding_in_later_passes(monkeypatch):
    """Every later pass gets a slightly different m, as if it saw logits that were rounded differently."""
    monkeypatch.setattr(Passes, "unshared", lambda backend, m, s: m * (1 + 3e-7))
    monkeypatch.setattr(Passes, "are_few", lambda backend, x: False)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("kernel", OF_LOGITS, ids=label)
@pytest.mark.slow
def test_another_rounding_in_later_passes(kernel, rng, other_rounding_in_later_passes):
    """Only the exponents get a relative error, even if one class has all probability except e^-40."""
    arguments = []
    for domain in kernel.domains:
        z = raw(rng)
        z[ROWS // 2 :, 2] = 60 + 10 * rng.standard_normal(ROWS // 2)
        arguments.append(z if domain == LOGIT else np.asarray(jax.nn.softmax(z / 10)))
    directions = tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in arguments)

    def run(arguments, directions):
        gradient = jax.grad(lambda *x: kernel.function(*x).sum(), tuple(range(len(arguments))))
        return kernel.function(*arguments), *jax.jvp(gradient, arguments, directions)

    got = run(tuple(map(jnp.asarray, arguments)), tuple(map(jnp.asarray, directions)))
    with jax.enable_x64(True):
        expected = run(tuple(map(np.float64, arguments)), tuple(map(np.float64, directions)))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-36)
