"""Results don't depend on the placement of arrays on a mesh, or on what JAX's types say about the placement."""

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
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.hlo import collectives
from jce._jax.layout import Layout
from tests.kernels import TABLE, easy, label, modes
from tests.optimized_jit import optimized_jit

pytestmark = pytest.mark.needs_jit  # only compiled programs show where an array lies
ROWS, CLASSES, WIDTH = 8, 16, 4
MODES = ("gradient", "jvp", "forward over reverse", "reverse over reverse")
PLACES = {
    "anywhere": None,  # a NumPy array, without a sharding
    "rows": ("rows", None),
    "classes": (None, "classes"),
    "both": ("rows", "classes"),
    "crossed": ("classes", "rows"),
}


def make_mesh(kind):
    return jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def place(x, where, mesh):
    """The array, split as the place says. A 1-D array is split over the last mesh axis that the place names."""
    if PLACES[where] is None:
        return x
    axes = PLACES[where] if x.ndim == 2 else [name for name in PLACES[where] if name][-1:]
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


def test_layout_of_shapes_with_fewer_or_more_axes():
    x = jax.device_put(np.zeros((2, 4, 6)), NamedSharding(make_mesh(AxisType.Explicit), P("rows", None, "classes")))
    for shape, spec in {
        (2, 4): ("rows", None),
        (2, 4, 6): ("rows", None, "classes"),
        (3, 2, 4, 6): (None, "rows", None, "classes"),
    }.items():
        assert Layout.of(shape, [x]).spec == spec


def test_the_layout_of_a_spec_has_its_explicit_mesh_axes():
    kinds = {"data": AxisType.Explicit, "rows": AxisType.Explicit, "classes": AxisType.Auto}
    mesh = AbstractMesh((2, 2, 2), tuple(kinds), axis_types=tuple(kinds.values()))
    assert Layout.said((4, 6, 8), mesh, P(("data", "rows"), "classes")).spec == (("data", "rows"), None, None)


class Row(NamedTuple):
    """A function of (non-differentiated inputs, *arguments), and the function to use on a mesh if it differs."""

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

        def loss(others, h, w, b, weights, f=jce.linear_cross_entropy, reduction=reduction):
            labels, where = others["labels"], others["where"]
            options = {"reduction": reduction, "label_smoothing": 0.1, "chunk_size": 3}
            return f(labels, h, w, b, weights=weights, where=where, **options)

        def on_mesh(*x, mesh, loss=loss):
            on = {"mesh": mesh, "token_axis": "rows", "class_axis": "classes"}
            return loss(*x, f=jce.on_mesh(jce.linear_cross_entropy, **on))

        arguments = (hidden, head, bias, rng.random(ROWS))
        rows[f"head, {reduction}"] = Row(loss, tokens, arguments)
        rows[f"sharded head, {reduction}"] = Row(loss, tokens, arguments, on_mesh)
    rows["log-probs"] = Row(
        lambda others, *x: functools.reduce(
            jnp.add, jce.linear_log_probs(others["labels"], *x, where=others["where"], log_normalizer=True)
        ),
        tokens,
        (hidden, head, bias),
    )
    rows["two heads"] = Row(
        lambda others, *x: jce.linear_kl_divergence(
            jce.Linear(*x[:2]), jce.Linear(*x[2:]), where=others["where"], reduction="none", chunk_size=3
        ),
        {"where": tokens["where"]},
        (rng.standard_normal((ROWS, 2 * WIDTH)), rng.standard_normal((CLASSES, 2 * WIDTH)), hidden, head),
    )
    return rows


TABLE_OF_ROWS = table()
KINDS = (AxisType.Auto, AxisType.Explicit)
CASES = list(AllPairs([list(TABLE_OF_ROWS), MODES, list(PLACES), list(PLACES), list(PLACES), KINDS, (True, False)]))


def close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), got, expected)


def same_type(x, y):
    assert jax.typeof(x).sharding.spec == jax.typeof(y).sharding.spec


def in_mode(function, mode, others, arguments, directions):
    """A derivative of Σ c · f in a mode."""

    def total(*x):
        result = function(others, *x)
        return (np.linspace(0.5, 1.5, result.size).reshape(result.shape) * result).sum()

    return modes(total, tuple(range(len(arguments))))[mode](arguments, directions)


@pytest.mark.parametrize("name", TABLE_OF_ROWS)
@pytest.mark.slow
def test_results_equal_those_on_one_device(name, rng):
    """Each function in each mode, with arguments, weights, `where` and labels at each place, combined pairwise."""
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
        expected = jax.jit(one_device)((row.others, row.arguments, directions))
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
                run = jax.jit(
                    lambda xs, f=function, g=group: [in_mode(f, m, *x) for (m, *_), x in zip(g, xs, strict=True)]
                )
                got = run([placed(*places) for _, *places in group])
            close(got, [expected[mode] for mode, *_ in group])
            if kind == AxisType.Explicit and context:  # a derivative is split like its argument
                for (mode, *places), derivatives in zip(group, got, strict=True):
                    if mode == "reverse over reverse":
                        for x, y in zip(derivatives, placed(*places)[1], strict=True):
                            if not isinstance(y, np.ndarray):  # a NumPy array's type has no sharding
                                same_type(x, y)


def on(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


@pytest.mark.slow
def test_arguments_that_broadcast(rng):
    """Scalars, rows and columns together with whole arrays; another class axis; tokens with two axes."""
    x, p, alpha = (
        rng.standard_normal((ROWS, CLASSES)),
        rng.dirichlet(np.ones(CLASSES), ROWS),
        rng.random((ROWS, CLASSES)),
    )
    hidden, head, bias = (rng.standard_normal(s) for s in ((4, 6, WIDTH), (CLASSES, WIDTH), CLASSES))
    labels, column = rng.integers(0, CLASSES, (4, 6)), rng.random((ROWS, 1)) < 0.7
    binary, soft = jce.binary_cross_entropy_with_logits, jce.cross_entropy_with_logits

    def weighted(h, w, b, weights):
        return jce.linear_cross_entropy(labels, h, w, b, weights=weights, where=labels % 5 != 3, chunk_size=3)

    mesh = make_mesh(AxisType.Explicit)
    both = (x, "rows", "classes")
    cases = [
        (lambda x: binary(1.0, x), [both]),
        (binary, [(alpha[0, 0],), both]),
        (binary, [(alpha[0],), both]),
        (binary, [(alpha[:1],), both]),
        (binary, [both, (alpha[:, :1], "classes")]),
        (soft, [(p[0],), both]),
        (lambda p, x: soft(p, x, where=on_mesh(column, "classes")), [(p, "classes"), both]),
        (lambda p, x: soft(p, x, where=on_mesh(column, "classes")), [(p,), (x,)]),
        (lambda p, x: soft(p, x, axis=0), [(p.T, "rows"), (x.T, None, "classes")]),
        (lambda x: jce.cross_entropy_with_integer_labels(on_mesh(labels.ravel()[:ROWS], "rows"), x), [(x,)]),
        (lambda x: jce.cross_entropy_with_integer_labels(labels.ravel()[:ROWS].astype(np.int8), x), [both]),
        (weighted, [(hidden, "rows"), (head, "rows"), (bias, "classes"), (np.float64(0.5),)]),
        (weighted, [(hidden, "rows", "classes"), (head, None, "rows"), (bias,), (alpha[:1, :6], None, "rows")]),
        (weighted, [(hidden, None, None, "rows"), (head, "classes"), (bias,), (alpha[:4, :1], "rows")]),
        (weighted, [(hidden,), (head, ("rows", "classes")), (bias,), (alpha[:4, :6],)]),
    ]
    on_mesh = functools.partial(on, mesh)

    def run(arguments):
        results = []
        for (function, given), a in zip(cases, arguments, strict=True):
            total = lambda *x, f=function: (f(*x) ** 2).sum()  # noqa: E731
            results.append(jax.value_and_grad(total, tuple(range(len(given))))(*a))
        return results

    with jax.enable_x64(True):
        with jax.set_mesh(mesh):
            got = jax.jit(run)([[on_mesh(*x) if x[1:] else x[0] for x in given] for _, given in cases])
        on_mesh = lambda x, *_: x  # noqa: E731
        close(got, jax.jit(run)([[x for x, *_ in given] for _, given in cases]))


@pytest.mark.holds_nan
@pytest.mark.slow
def test_labels_with_split_classes(rng):
    """Each class as label, and labels outside [0, n), including negative labels that are valid indices in NumPy."""
    labels = np.array([*range(CLASSES), -1, -CLASSES, CLASSES, CLASSES + 1, 2**31 - 1, -(2**31), 0, 1], np.int32)
    logits = rng.standard_normal((len(labels), CLASSES)).astype(np.float32)

    def run(labels, x):
        return jax.value_and_grad(lambda x: jnp.nansum(jce.cross_entropy_with_integer_labels(labels, x)))(x)

    mesh = make_mesh(AxisType.Explicit)
    for axes in ((None, "classes"), ("rows", "classes"), (None, ("rows", "classes"))):
        x = on(mesh, logits, *axes)
        with jax.set_mesh(mesh):
            np.testing.assert_array_equal(np.isnan(jce.cross_entropy_with_integer_labels(labels, x))[CLASSES:-2], True)
            got = jax.jit(run)(labels, x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, jax.jit(run)(labels, logits))


@pytest.mark.slow
def test_mixed_axis_types(rng):
    """A mesh that is Explicit along rows and Auto along classes, and a mesh whose classes a shard_map has split."""
    kinds = (AxisType.Explicit, AxisType.Auto)
    mixed = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=kinds, devices=jax.devices()[:4])
    mesh = make_mesh(AxisType.Explicit)
    logits, hidden, head = (rng.standard_normal(s) for s in ((ROWS, CLASSES), (ROWS, WIDTH), (CLASSES, WIDTH)))
    labels = rng.integers(0, CLASSES, ROWS)

    def both(x, h, w, axis_name=None):
        loss = jce.cross_entropy_with_integer_labels(labels, x, axis_name=axis_name)
        return loss, jce.linear_cross_entropy(labels, h, w, axis_name=axis_name, chunk_size=3)

    with jax.enable_x64(True):
        expected = both(logits, hidden, head)
        for m in (mixed, mesh):
            function, arguments = (
                both,
                (on(m, logits, "rows", "classes"), on(m, hidden, "rows"), on(m, head, "classes")),
            )
            if m is mesh:
                split = P(None, "classes"), P(), P("classes")
                some = functools.partial(both, axis_name="classes")
                function = jax.shard_map(some, in_specs=split, out_specs=P(), axis_names={"classes"})
            with jax.set_mesh(m):
                close(jax.jit(function)(*arguments), expected)


# Communication


def sent(function, *arguments):
    """The collectives for abstract arguments on a mesh."""
    with jax.set_mesh(arguments[0].sharding.mesh):
        return collectives(optimized_jit(function).lower(*arguments).compile().as_text())


def abstract(shape, *axes, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(make_mesh(AxisType.Explicit), P(*axes)))


@pytest.mark.parametrize("name", ["cross_entropy_with_logits", "kl_divergence_with_logits", "labels"])
@pytest.mark.in_turn(12)
def test_communication_of_rows(name):
    """With rows and classes split, a gradient and reverse over reverse send at most one number per row at a time."""
    rows, x = 64, abstract((64, 512), "rows", "classes")
    arguments = (x,) if name == "labels" else (x, x)

    def run(labels, a, t):
        f = functools.partial(jce.cross_entropy_with_integer_labels, labels) if name == "labels" else getattr(jce, name)
        programs = modes(lambda *a: f(*a).sum(), tuple(range(len(a))))
        return programs["gradient"](a, t), programs["reverse over reverse"](a, t)

    labels = abstract((rows,), "classes", dtype=np.int32)  # the labels must be moved
    found = sent(run, labels, arguments, arguments)
    assert found
    assert max(c.size for c in found) <= rows


def test_communication_of_a_row_that_broadcasts_to_a_batch():
    """The row's derivative is summed over the batch's devices. The derivative of the whole batch isn't sent."""
    row, batch = abstract((1, 512), None, None), abstract((64, 512), "rows", "classes")
    gradient = jax.grad(lambda q, p: jce.cross_entropy(p, q).sum())
    assert max(c.size for c in sent(gradient, row, batch)) <= 512


@pytest.mark.slow
def test_communication_of_a_head_split_by_type():
    """If types say how the arguments are split, the collectives are the same as with `on_mesh`."""
    hidden, head = abstract((256, 16), "rows"), abstract((1024, 16), "classes")
    labels = abstract((256,), "rows", dtype=np.int32)
    on = {"mesh": hidden.sharding.mesh, "token_axis": "rows", "class_axis": "classes"}

    def gradient(function):
        return jax.value_and_grad(lambda h, w, y: function(y, h, w, chunk_size=8), (0, 1))

    by_type = sent(gradient(jce.linear_cross_entropy), hidden, head, labels)
    on_mesh = sent(gradient(jce.on_mesh(jce.linear_cross_entropy, **on)), hidden, head, labels)
    assert sorted(by_type) == sorted(on_mesh)
    assert {c.kind for c in by_type} == {"all-reduce"}


# Limitations of JAX


@pytest.mark.slow
def test_gradients_inside_a_shard_map_without_check_vma():
    """In plain JAX too, such a gradient is off by a factor, the number of devices. A gradient taken outside is correct.

    If this test fails, docstrings and jce/README.md can say less."""
    mesh, x = make_mesh(AxisType.Auto), np.arange(4.0, dtype=np.float32)

    def squares(x):
        return jax.lax.psum((x * x).sum(), "classes")

    def split(function, out):
        return jax.shard_map(function, mesh=mesh, in_specs=P("classes"), out_specs=out, check_vma=False)

    np.testing.assert_allclose(split(jax.grad(squares), P("classes"))(x), 2 * 2 * x)
    np.testing.assert_allclose(jax.grad(split(squares, P()))(x), 2 * x)
