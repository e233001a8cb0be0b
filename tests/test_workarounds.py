"""When a workaround in jce can be deleted: each row tests whether plain JAX still behaves as the comment says.

The comment begins with `Until JAX 0.12:` if we know a release that doesn't need the workaround, and otherwise with
`Until JAX no longer`. A row without a version fails on the first JAX that behaves differently. A row for version V
fails if the workaround isn't needed before V, if it is needed from V on, or if pyproject.toml admits no JAX before V.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.core
import jax.extend.core
import jax.interpreters.ad
import jax.interpreters.batching
import jax.interpreters.mlir
import jax.interpreters.partial_eval
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jce._jax.varying import varying
from tests.jaxprs import equations
from tests.optimized_jit import optimized_jit

ROOT = Path(__file__).parents[1]
Version = tuple[int, int]
RUNNING: Version = jax.__version_info__[:2]


class Place(NamedTuple):
    """A comment: its file in jce and its first line."""

    file: str
    line: str

    @property
    def until(self) -> Version | None:
        """The first JAX that doesn't need the workaround, if the comment names one."""
        found = re.search(r"Until JAX (\d+)\.(\d+):", self.line)
        return found and (int(found[1]), int(found[2]))


class Row(NamedTuple):
    """A workaround: its file, and words that no other comment in that file has in its first line."""

    file: str
    words: str
    still: Callable[[], bool]  # whether the installed JAX behaves as the comment says
    since: Version = (0, 0)  # the first JAX that behaves like that

    def is_of(self, place: Place) -> bool:
        return self.file == place.file and self.words in place.line


def places() -> list[Place]:
    files = {path.relative_to(ROOT / "jce").as_posix(): path for path in sorted((ROOT / "jce").rglob("*.py"))}
    lines = ((name, line) for name, path in files.items() for line in path.read_text("utf-8").splitlines())
    return [Place(name, line[line.index("Until JAX") :]) for name, line in lines if "Until JAX" in line]


def place_of(row: Row) -> Place:
    found = [place for place in places() if row.is_of(place)]
    assert len(found) == 1, f"jce/{row.file} has {len(found)} workarounds instead of one with the words {row.words!r}"
    return found[0]


def oldest_admitted() -> Version:
    found = re.search(r'^dependencies = \["jax>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    return int(found[1]), int(found[2])


def named(version: Version) -> str:
    return ".".join(map(str, version))


def complaint(row: Row, place: Place, running: Version, oldest: Version, still: bool) -> str | None:
    """What to do about a workaround, or None if nothing."""
    where = f"in jce/{row.file}: {place.line!r}"
    if place.until and oldest >= place.until:
        return f"JAX no longer needs it since {named(place.until)}: delete the workaround {where}"
    if still == (row.since <= running < (place.until or (math.inf, 0))):
        return None
    if still:
        return (
            f"JAX {named(running)} behaves as the comment says, but the comment or the row excludes this version:"
            f" correct the versions {where}"
        )
    return (
        f"JAX {named(running)} no longer behaves as the comment says: if all newer versions are the same, write"
        f" `Until JAX {named(running)}: ...`, and delete the workaround when pyproject.toml requires this JAX, {where}"
    )


# Loops and matmuls


def a_loop_loses_rules() -> bool:
    """Whether a rule called by another rule is lost when the gradient of a loop is differentiated again."""

    @jax.custom_jvp
    def slope(x):
        return 0 * x

    @jax.custom_jvp
    def function(x):
        return x

    slope.defjvp(lambda x, t: (slope(*x), 7 * t[0]))
    function.defjvp(lambda x, t: (function(*x), slope(*x) * t[0]))

    def gradient(x):
        return jax.grad(lambda x: lax.map(function, x).sum())(x)

    return jax.grad(lambda x: gradient(x).sum())(np.ones(1, np.float32)) != 7


def a_loop_hoists_what_stays_the_same() -> bool:
    """Whether differentiated gradient steps store numbers per token and class that depend only on labels."""
    chunk, chunks, classes = 8, 8, 64
    labels = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    hidden, head = (np.ones(shape, np.float32) for shape in ((chunks, chunk, 3), (classes, 3)))

    def largest_array(tied: Callable) -> int:
        @jax.checkpoint
        def of_chunk(h, y, w):
            x = h @ w.T
            return (jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, y[:, None], 1)[:, 0]).sum()

        def loss(w):
            h, y, w = tied((hidden, labels, w))
            return lax.map(lambda tokens: of_chunk(*tokens, w), (h, y)).sum()

        def after_steps(w):
            return lax.scan(lambda w, _: (w - jax.grad(loss)(w), None), w, length=3)[0].sum()

        program = jax.make_jaxpr(jax.grad(after_steps))(head).jaxpr
        return max(v.aval.size for e in equations(program) for v in e.outvars)

    assert largest_array(lax.optimization_barrier) <= 2 * chunk * classes
    return largest_array(lambda arrays: arrays) >= chunks * chunk * classes


def products_of_constants_are_folded() -> bool:
    """Whether a matmul of two arrays that a program closes over is computed during compilation."""
    rng = np.random.default_rng(0)
    h, w = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((8, 4), (16, 4)))
    return " dot(" not in optimized_jit(lambda: h @ w.T).lower().compile().as_text()


def large_constants_are_folded() -> bool:
    """Whether a sum of exponentials of an array that a program closes over is computed during compilation."""
    x = jnp.ones((64, 1024), np.float32)
    return "exponential" not in optimized_jit(lambda: jnp.exp(x).sum(-1)).lower().compile().as_text()


def products_over_unit_axes_are_copied() -> bool:
    """Whether a sum over two axes copies a factor although one of the axes has length 1."""
    a, b = (np.ones(shape, np.float32) for shape in ((64, 1, 32), (64, 1, 48)))

    def temporary(formula: str, *factors) -> int:
        program = optimized_jit(lambda *factors: jnp.einsum(formula, *factors)).lower(*factors).compile()
        return program.memory_analysis().temp_size_in_bytes

    return temporary("cud,cun->dn", a, b) >= temporary("cd,cn->dn", a[:, 0], b[:, 0]) + a.nbytes


# Sums on a CPU


def one_row_is_summed_sequentially() -> bool:
    """Whether a sum of products is hundreds of ulps off in a batch of one row, but not in a batch of two."""
    program = optimized_jit(lambda x, y: (x * y).sum(-1))
    one, two = (program(*(np.full((count, 30_000), x, np.float32) for x in (0.1, 0.3)))[0] for count in (1, 2))
    return bool(np.abs(one - two) > 100 * np.spacing(two))


def longer_rows_are_summed_slowly() -> bool:
    """Whether rows of slightly more than 32,768 numbers take 1.6 times as long as rows of 32,768."""
    program = optimized_jit(lambda x, m: ((x - m) * x * (x + m)).sum(-1))
    batches = [(jnp.ones((128, n), np.float32), jnp.ones((128, 1), np.float32)) for n in (32_768, 32_832)]
    times = [[], []]
    for _ in range(20):
        for batch, seconds in zip(batches, times, strict=True):
            start = time.perf_counter()
            program(*batch).block_until_ready()
            seconds.append(time.perf_counter() - start)
    short, long = map(min, times)
    return long > 1.6 * short


def large_arrays_lose_a_nan() -> bool:
    """Whether a maximum, and a sum over minima, drop a NaN in an array of 4,096 numbers, but not in one of 64."""

    @jax.debug_nans(False)
    def are_lost(count: int) -> list[bool]:
        x = jnp.zeros((count, count), np.float32).at[0, 0].set(jnp.nan)
        operations = [lambda x: x.max(-1), lambda x: jnp.minimum(jnp.exp(x), 2).sum(-1)]
        return [not np.isnan(optimized_jit(operation)(x)[0]) for operation in operations]

    assert not any(are_lost(8))
    return all(are_lost(64))


def a_dot_product_is_wrong() -> bool:
    """Whether XLA computes x - Σ cx incorrectly if a whole batch shares one c."""
    rng = np.random.default_rng(0)
    c, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 50), (64, 256, 50)))
    got = optimized_jit(jax.vmap(lambda x: x - (c * x).sum(-1, keepdims=True)))(x)
    return bool(np.abs(got - (x - (c * x).sum(-1, keepdims=True))).max() > 1)


# Meshes


def error_of(function: Callable, *arguments) -> str:
    """The error's class and text, or an empty string if there is no error."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def types_are_checked_wrongly() -> bool:
    """Whether a split batch has a gradient only under `check_vma=False`."""
    mesh = jax.make_mesh((2, 4), ("batch", "classes"), axis_types=(AxisType.Auto,) * 2)

    def sum_of_part(x):
        return lax.scan(lambda s, x: (s + x, None), 0 * x[0], x)[0][None]

    def error(checked: bool) -> str:
        split = jax.shard_map(sum_of_part, mesh=mesh, in_specs=P("classes"), out_specs=P("classes"), check_vma=checked)
        batch = jax.vmap(split, spmd_axis_name="batch")
        return error_of(jax.jit(jax.grad(lambda x: batch(x).sum())), np.ones((4, 8), np.float32))

    assert not error(checked=False)
    return error(checked=True).startswith("ValueError")


def lookups_along_a_split_axis_are_refused() -> bool:
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((2, 16), np.float32), NamedSharding(mesh, P(None, "classes")))
        labels = np.zeros((2, 1), np.int32)
        return error_of(lambda: jnp.take_along_axis(x, labels, -1, mode="clip")).startswith("ShardingTypeError")


def a_barrier_mixes_types() -> bool:
    """Whether an array behind a barrier also varies over the mesh axes of another array."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    found = []

    def part(x, y):
        x, y = lax.optimization_barrier((x, y))
        found.extend([varying(x), varying(y)])
        return x.sum() + y.sum()[None]

    jax.make_jaxpr(jax.shard_map(part, mesh=mesh, in_specs=(P("a"), P("b")), out_specs=P(("a", "b"))))(
        np.ones(4, np.float32), np.ones(4, np.float32)
    )
    return found != [{"a"}, {"b"}]


def types_have_vma() -> bool:
    return hasattr(jax.typeof(jnp.ones(1)), "vma")


# checkify


def checks_get_no_context() -> bool:
    """Whether the function that checks a primitive gets the error as its first argument."""
    from jax._src.checkify import error_checks

    given = []

    def look(*arguments, **static):
        given.extend(arguments)
        return own(*arguments, **static)

    own = error_checks[lax.sin_p]
    with mock.patch.dict(error_checks, {lax.sin_p: look}):
        checkify.checkify(lambda x: lax.sin(x), errors=checkify.float_checks)(np.float32(1))
    return isinstance(given[0], checkify.Error)


def checks_in_a_rule_have_no_gradient() -> bool:
    """Whether JAX raises an error for the gradient of a checked custom_jvp function under jit."""

    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvp(lambda x, t: (double(*x), 2 * t[0]))
    checked = checkify.checkify(jax.jit(double), errors=checkify.float_checks)
    return error_of(jax.grad(lambda x: checked(x)[1]), np.float32(1)).startswith("ValueError")


def indices_in_a_checkpoint_are_errors() -> bool:
    """Whether checkify fails at an index inside a jax.checkpoint."""
    looked_up = checkify.checkify(jax.checkpoint(lambda x, y: x[y]), errors=checkify.index_checks)
    return error_of(looked_up, np.ones(3, np.float32), np.int32(1)).startswith("ValueError")


def batches_of_updates_are_errors() -> bool:
    """Whether checkify fails at a batch of updates."""
    updated = checkify.checkify(jax.vmap(lambda x, y: x.at[y].set(0.0)), errors=checkify.index_checks)
    return error_of(updated, np.ones((2, 3), np.float32), np.array([0, 1])).startswith("IndexError")


def derivatives_of_lookups_are_errors() -> bool:
    """Whether checkify fails at the gradient of a batch of lookups."""

    def total(x, y):
        return jax.vmap(lambda x, y: x[y])(x, y).sum()

    checked = checkify.checkify(jax.grad(total), errors=checkify.index_checks)
    return error_of(checked, np.ones((2, 3), np.float32), np.array([0, 1])).startswith("IndexError")


def lookups_of_several_labels_are_errors() -> bool:
    """Whether checkify fails at the gradient of a batch of lookups if only the labels have a batch axis."""
    labels = np.array([[0, 1]] * 3)

    def at_labels(x):
        def at(x, y):
            return jnp.take_along_axis(x, y[:, None], 1, mode="clip")

        return jax.vmap(at, (None, 1))(x, labels).sum()

    checked = checkify.checkify(jax.grad(at_labels), errors=checkify.index_checks)
    return error_of(checked, np.ones((3, 4), np.float32)).startswith("IndexError")


# Imports


def is_hidden(thing: object) -> bool:
    """Whether no public JAX module, imported above or by JAX itself, has the object under any name."""
    public = re.compile(r"jax(\.(?!_src|experimental).*)?|jax\.experimental\.checkify")
    modules = [module for name, module in sys.modules.items() if public.fullmatch(name)]
    return not any(x is thing for module in modules for x in vars(module).values())


def batch_axes_are_hidden() -> bool:
    from jax._src.core import get_axis_env

    return is_hidden(get_axis_env)


def how_to_check_is_hidden() -> bool:
    from jax._src.checkify import checkify_jaxpr, error_checks, nan_error_check

    return any(map(is_hidden, (checkify_jaxpr, error_checks, nan_error_check)))


def the_class_of_primitives_comes_with_pallas() -> bool:
    line = "import jax.extend.core, sys; print(any('pallas' in name for name in sys.modules))"
    return subprocess.run([sys.executable, "-c", line], capture_output=True, check=True, text=True).stdout == "True\n"


ROWS = [
    Row("_heads/loss/evaluated.py", "copies both factors", products_over_unit_axes_are_copied),
    Row("_heads/loss/evaluated.py", "checkify adds a check", indices_in_a_checkpoint_are_errors),
    Row("_heads/loss/evaluated.py", "a batch of updates", batches_of_updates_are_errors),
    Row("_heads/loss/evaluated.py", "a batch of lookups", derivatives_of_lookups_are_errors),
    Row("_heads/places/mesh.py", "fails its type checks under spmd_axis_name", types_are_checked_wrongly),
    Row("_heads/loop/loop.py", "our own custom_jvp", a_loop_loses_rules),
    Row("_heads/loop/unhoisted.py", "hoists out of a loop", a_loop_hoists_what_stays_the_same),
    Row("_heads/loop/unhoisted.py", "fold constants", products_of_constants_are_folded),
    Row("_jax/rows.py", "fails its type checks under spmd_axis_name", types_are_checked_wrongly),
    Row("_jax/classes.py", "sums longer float32 rows", longer_rows_are_summed_slowly, since=(0, 10)),
    Row("_jax/classes.py", "loses a NaN", large_arrays_lose_a_nan, since=(0, 10)),
    Row("_jax/classes.py", "refuses lookups", lookups_along_a_split_axis_are_refused),
    Row("_jax/varying.py", "all arrays of one barrier", a_barrier_mixes_types),
    Row("_jax/varying.py", "have `vma`", types_have_vma),
    Row("_jax/layout.py", "hides which spmd_axis_name", batch_axes_are_hidden),
    Row("_jax/primitives.py", "hides how checkify is told", how_to_check_is_hidden),
    Row("_jax/primitives.py", "imports Pallas", the_class_of_primitives_comes_with_pallas, since=(0, 10)),
    Row("_jax/primitives.py", "passes no context", checks_get_no_context),
    Row("_jax/public.py", "XLA fold such constants", large_constants_are_folded),
    Row("_jax/public.py", "raises a ValueError for the gradient", checks_in_a_rule_have_no_gradient),
    Row("_jax/row_sum.py", "sums [1, n] sequentially", one_row_is_summed_sequentially, since=(0, 10)),
    Row("_numerics/calculus.py", "inlines the kernels", a_loop_loses_rules),
    Row("_numerics/mul0.py", "with one c for a whole batch", a_dot_product_is_wrong, since=(0, 10)),
    Row("_quantities/label_log_probs.py", "an IndexError of its own", lookups_of_several_labels_are_errors),
    Row("_softmax/backend.py", "loses the kernels' rules", a_loop_loses_rules),
]
MEASURED = [longer_rows_are_summed_slowly]  # measured by a clock, so sometimes wrong on a busy machine


def test_each_workaround_has_a_row():
    found = places()
    assert found
    for place in found:
        assert place.until or place.line.startswith("Until JAX no longer "), f"in jce/{place.file}: {place.line!r}"
        rows = [row for row in ROWS if row.is_of(place)]
        assert len(rows) == 1, f"{len(rows)} rows instead of one for the workaround in jce/{place.file}: {place.line!r}"
    for row in ROWS:
        place_of(row)


@pytest.mark.needs_jit
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.file} {row.words}", marks=[pytest.mark.slow] if row.still in MEASURED else [])
        for row in ROWS
    ],
)
@pytest.mark.wide
def test_a_workaround_is_still_needed(row):
    wrong = complaint(row, place_of(row), RUNNING, oldest_admitted(), row.still())
    assert wrong is None, wrong


@pytest.mark.parametrize(
    ("line", "running", "oldest", "still", "said"),
    [
        ("Until JAX no longer hides it: an import.", (0, 12), (0, 8), True, None),
        ("Until JAX no longer hides it: an import.", (0, 13), (0, 8), False, "`Until JAX 0.13: "),
        ("Until JAX 0.12: it hides it.", (0, 11), (0, 8), True, None),
        ("Until JAX 0.12: it hides it.", (0, 12), (0, 8), False, None),
        ("Until JAX 0.12: it hides it.", (0, 11), (0, 8), False, "JAX 0.11 no longer behaves as the comment says"),
        ("Until JAX 0.12: it hides it.", (0, 12), (0, 8), True, "correct the versions"),
        ("Until JAX 0.12: it hides it.", (0, 8), (0, 8), True, "correct the versions"),  # before `since`
        ("Until JAX 0.12: it hides it.", (0, 13), (0, 12), False, "delete the workaround in jce/a.py"),
    ],
)
def test_complaints_about_a_workaround(line, running, oldest, still, said):
    got = complaint(Row("a.py", "hides", lambda: still, since=(0, 9)), Place("a.py", line), running, oldest, still)
    assert got is None if said is None else said in got
