"""Arrays that lie anywhere on a mesh, whatever JAX's types say of it: the numbers of one device."""

import collections
import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from tests.kernels import TABLE, easy, label, modes

pytestmark = pytest.mark.needs_jit  # where an array lies is known of compiled programs
ROWS, CLASSES, WIDTH = 8, 16, 4
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MODES = ("gradient", "jvp", "forward over reverse", "reverse over reverse")
PLACES = {
    "anywhere": None,  # an array of NumPy's, of which nothing is said
    "rows": ("rows", None),
    "classes": (None, "classes"),
    "both": ("rows", "classes"),
    "crossed": ("classes", "rows"),
}


def make_mesh(kind):
    return jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def place(x, where, mesh):
    """The array with its axes there; of a single axis it takes the last that the place names."""
    if PLACES[where] is None:
        return x
    axes = PLACES[where] if x.ndim == 2 else [name for name in PLACES[where] if name][-1:]
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


class Row(NamedTuple):
    """A function of (what is not differentiated, *arguments); on a mesh, maybe another."""

    function: Callable
    others: dict
    arguments: tuple
    on_mesh: Callable | None = None


def table():
    rng = np.random.default_rng(2026)
    labels, kept = rng.integers(0, CLASSES, ROWS), rng.random((ROWS, CLASSES)) < 0.8
    kept[np.arange(ROWS), labels] = True
    rows = {}
    for kernel in TABLE:
        if kernel.name == "cross_entropy_with_integer_labels":
            continue
        others = {"where": kept} if kernel.has_classes else {}
        rows[label(kernel)] = Row(
            lambda others, *x, f=kernel.function: f(*x, **others),
            others,
            tuple(easy(kernel, rng, (ROWS, CLASSES), np.float64)),
        )
    for smoothing in (0.0, 0.1):
        rows[f"labels, smoothing {smoothing}"] = Row(
            lambda others, x, e=smoothing: jce.cross_entropy_with_integer_labels(
                others["labels"], x, where=others["where"], label_smoothing=e
            ),
            {"labels": labels, "where": kept},
            (rng.standard_normal((ROWS, CLASSES)),),
        )
    hidden, head, bias = (rng.standard_normal(s) for s in ((ROWS, WIDTH), (CLASSES, WIDTH), CLASSES))
    tokens = {"labels": labels, "where": np.arange(ROWS) % 4 != 3}
    for reduction in ("mean", "none"):

        def loss(others, h, w, b, weights, f=jce.linear_cross_entropy, reduction=reduction, **on):
            labels, where = others["labels"], others["where"]
            options = {"reduction": reduction, "label_smoothing": 0.1, "chunk_size": 3}
            return f(labels, h, w, b, weights=weights, where=where, **options, **on)

        def on_mesh(*x, mesh, loss=loss):
            on = {"mesh": mesh, "token_axis": "rows", "class_axis": "classes"}
            return loss(*x, f=jce.sharded_linear_cross_entropy, **on)

        arguments = (hidden, head, bias, rng.random(ROWS))
        rows[f"head, {reduction}"] = Row(loss, tokens, arguments)
        rows[f"sharded head, {reduction}"] = Row(loss, tokens, arguments, on_mesh)
    rows["log-probs"] = Row(
        lambda others, *x: functools.reduce(jnp.add, jce.linear_log_probs(others["labels"], *x, where=others["where"])),
        tokens,
        (hidden, head, bias),
    )
    return rows


TABLE_OF_ROWS = table()
KINDS = (AxisType.Auto, AxisType.Explicit)
CASES = list(AllPairs([list(TABLE_OF_ROWS), MODES, list(PLACES), list(PLACES), list(PLACES), KINDS, (True, False)]))


def close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), got, expected)


def in_mode(function, mode, others, arguments, directions):
    """Σ c · f in a mode."""

    def total(*x):
        result = function(others, *x)
        return (np.linspace(0.5, 1.5, result.size).reshape(result.shape) * result).sum()

    return modes(total, tuple(range(len(arguments))))[mode](arguments, directions)


def compiled(function):
    return jax.jit(function, compiler_options=QUICKLY)


@pytest.mark.parametrize("name", TABLE_OF_ROWS)
def test_numbers_of_one_device(name, rng):
    """Pairwise: each function in each mode, with arguments, weights, where and labels in each place."""
    row = TABLE_OF_ROWS[name]
    directions = tuple(rng.standard_normal(x.shape) for x in row.arguments)
    cases = collections.defaultdict(list)
    for _, *case, kind, context in (case for case in CASES if case[0] == name):
        cases[kind, context].append(case)

    def one_device(x):
        return {
            mode: in_mode(row.function, mode, *x) for mode in {case[0] for group in cases.values() for case in group}
        }

    with jax.enable_x64(True):
        expected = compiled(one_device)((row.others, row.arguments, directions))
        for (kind, context), group in cases.items():
            mesh = make_mesh(kind)
            function = row.function if row.on_mesh is None else functools.partial(row.on_mesh, mesh=mesh)

            def placed(first, rest, other, mesh=mesh):
                places = [first] + [rest] * (len(row.arguments) - 1)
                return (
                    {key: place(x, other, mesh) for key, x in row.others.items()},
                    *(
                        tuple(place(*x, mesh) for x in zip(xs, places, strict=True))
                        for xs in (row.arguments, directions)
                    ),
                )

            with jax.set_mesh(mesh) if context else contextlib.nullcontext():
                run = compiled(
                    lambda xs, f=function, g=group: [in_mode(f, m, *x) for (m, *_), x in zip(g, xs, strict=True)]
                )
                got = run([placed(*places) for _, *places in group])
            close(got, [expected[mode] for mode, *_ in group])
