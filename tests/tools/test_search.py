"""Tests of the search for the largest errors: it finds a fault, and the known errors stay within the bounds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

import jce
from bench import results, search
from bench.__main__ import main
from bench.search import arguments, child, climb, corpus, floats, long_rows
from bench.search.functions import ALL, BARS, FEW, IN_BLOCKS, LONG, MANY, WHOLE, Searched
from bench.search.judging import LEAST, by_mpmath, judged
from bench.search.scales import HVP, SCALES, conditioning, deviance, lost_of_differences
from jce._jax import platforms as _platforms
from jce._jax.classes import LONGEST_ROW
from tests import oracle
from tests.kernels import LOGIT, ROWS

BY_LABEL = {searched.label: searched for searched in ALL}
each_searched = pytest.mark.parametrize("searched", ALL, ids=lambda searched: searched.label)


@pytest.fixture(autouse=True)
def x64():
    """The search's reference is in float64."""
    with jax.enable_x64(True):
        yield


def todo(**others):
    return {"device": "CPU", "long": False, "quick": True, "seconds": 60.0, "seed": 0} | others


# Known errors


def stored() -> dict[tuple, list]:
    """The stored arguments with their result lines, by function and number of classes: one program for each."""
    found = {}
    for line in PUBLISHED:
        if line["library"] == "jce":
            for _, point in corpus.points(BY_LABEL[line["function"]], [line]):
                found.setdefault((line["function"], np.size(point[0])), []).append((line, point))
    return found


PUBLISHED = corpus.read([search.PUBLISHED])
STORED = stored()


@pytest.mark.parametrize(("label", "n"), STORED)
@pytest.mark.in_turn(54)
def test_the_largest_known_errors_are_within_the_bars(label, n):
    """Errors are measured again, at all stored arguments, in batches of the size in which they were found."""
    if n == MANY and not _platforms.CPU.is_cpu:
        pytest.skip("many classes are summed one after another")
    searched = BY_LABEL[label]
    k = len(searched.kernel.arguments)
    for off_grid in (False, True):
        again = climb.Search(searched, n, off_grid, 0)
        known = [x for x in STORED[label, n] if (x[0]["arguments"] == child.OFF_GRID) == off_grid]
        columns = zip(*(point for _, point in known), strict=True)
        batch = [np.resize(np.stack(column), again.shape) for column in columns]
        found = judged(searched, batch[:k], batch[k:], off_grid) if known else {}
        for i, (line, point) in enumerate(known):
            quantity = line["quantity"]
            error, bar = found[quantity].of_rows[i], searched.bar(quantity, line["arguments"], _platforms.CPU.is_cpu)
            assert error <= bar, (quantity, error, bar, corpus.told(searched, quantity, point))


QUICK_LONG_ROWS = ("cross_entropy_with_integer_labels", "cross_entropy_with_logits", "kl_divergence_with_logits")
STORED_LONG_ROWS = [
    pytest.param(x.label, n, marks=[] if n == 4096 and x.label in QUICK_LONG_ROWS else pytest.mark.slow)
    for x in ALL
    for n in LONG
    if x.long
]


@pytest.mark.parametrize(("label", "n"), STORED_LONG_ROWS)
def test_the_largest_known_errors_in_long_rows_are_within_the_bars(label, n):
    if not _platforms.CPU.is_cpu:
        pytest.skip("this CPU sums such rows one number after another")
    searched = BY_LABEL[label]
    known = long_rows.known(searched, n, PUBLISHED)
    errors = long_rows.Search(searched, n, seed=0).errors([point for _, point in known])
    assert {line["quantity"] for line, _ in known} == set(errors)
    for i, (line, point) in enumerate(known):
        error, bar = errors[line["quantity"]][i], searched.bar(line["quantity"], line["arguments"])
        assert error <= bar, (line["quantity"], error, bar, point)


def test_every_dense_function_is_searched():
    of_heads = {"linear_kl_divergence", "linear_map", "Linear", "on_mesh"}
    assert {searched.kernel.name for searched in ALL} == set(jce.__all__) - of_heads - {"check_distribution"}
    assert len(BY_LABEL) == len(ALL)


def test_an_error_beyond_its_bar_raises(monkeypatch):
    point = {"ulps": 6.5, "at": {}, "by_mpmath": 6.5}
    line = child.line(BY_LABEL["binary_entropy"], "value", child.ALL_FLOATS, "CPU", [point])
    search.check([line])
    with pytest.raises(AssertionError, match=r"binary_entropy.*∂alpha.*6\.5"):
        search.check([line | {"quantity": "∂alpha"}])
    with pytest.raises(AssertionError):
        search.check([line | {"worst": [point | {"by_mpmath": 5.5}]}])


# Finding a fault


def textbook_loss(x):
    return jax.nn.logsumexp(x, axis=-1) - x[..., 0]


def log1p_by_atanh(x):
    """log(1 + β) computed only from atanh(β/(2 + β)), which is inaccurate for large |x|."""
    e = jnp.exp(-jnp.abs(x))
    return jnp.maximum(-x, 0) + jnp.log((1 + e / (2 + e)) / (1 - e / (2 + e)))


def largest(some: climb.Search) -> float:
    return max(found[0] for found in some.worst["value"].ordered())


@pytest.mark.parametrize(
    ("row", "function", "classes", "ulps"),
    [
        ("cross_entropy_with_integer_labels", textbook_loss, 3, 1e6),
        ("binary_entropy_with_logits", log1p_by_atanh, 1, 1e6),
        ("sampled_kl_divergence", lambda a, b: jnp.exp(b - a) - 1 - (b - a), 1, 1e6),
    ],
)
def test_a_bad_formula_is_found(row, function, classes, ulps):
    bad = Searched(dataclasses.replace(ROWS[row], function=function))
    some = climb.Search(bad, classes, False, 0)
    climb.run([some], 60, 2)
    assert largest(some) > ulps


def test_a_bad_formula_is_found_in_long_rows():
    bad = Searched(dataclasses.replace(ROWS["cross_entropy_with_integer_labels"], function=textbook_loss), long=True)
    some = long_rows.Search(bad, 4096, seed=0)
    some.step()
    assert some.worst["value"][0][0] > 1e4


def test_climbing_finds_more_than_random_sampling():
    searched = BY_LABEL["sampled_kl_divergence"]
    climbing, drawing = (climb.Search(searched, 1, False, 0) for _ in range(2))
    climb.run([climbing], 600, 6)
    for _ in range(6):
        drawing.try_(arguments.fresh(drawing.rng, drawing.numbers, drawing.shape))
    assert climbing.tried == drawing.tried
    assert largest(climbing) > 1.05 * largest(drawing)


def test_a_run_is_reproducible():
    searched = BY_LABEL["sampled_kl_divergence"]
    first, second = (climb.Search(searched, 1, False, 7) for _ in range(2))
    for some in (first, second):
        climb.run([some], 600, 2)
    assert first.worst["value"].ordered()[0][0] == second.worst["value"].ordered()[0][0]


# Arguments


@each_searched
@pytest.mark.parametrize("off_grid", [False, True])
def test_arguments_stay_in_their_domains(searched, off_grid, rng):
    of = arguments.kinds(searched, off_grid)
    shape = (500, 5) if searched.kernel.has_classes else (500,)
    points = arguments.fresh(rng, of, shape)
    for _ in range(4):
        points = arguments.neighbours(rng, of, points)
        for numbers, x in zip(of, points, strict=True):
            assert (x.shape, x.dtype) == (shape, np.float32)
            assert np.all((x >= numbers.lowest) & (x <= numbers.highest))
            assert np.all((x == 0) | (np.abs(x) >= LEAST))
            assert not numbers.grid or np.all(x / numbers.grid == np.round(x / numbers.grid))


def test_on_the_grid_differences_are_exact(rng):
    x = arguments.GRID_OF_LOGITS.fresh(rng, (1000, 4))
    differences = x[:, :2] - x[:, 2:]
    np.testing.assert_array_equal(differences, x[:, :2].astype(np.float64) - x[:, 2:])
    of_those = differences[:, 0] - differences[:, 1]
    np.testing.assert_array_equal(of_those, differences[:, 0].astype(np.float64) - differences[:, 1])


def test_steps_are_ulps_across_0():
    numbers = arguments.Numbers(arguments.one_logit, -8, 8)
    x = np.array([1, 1, -1, 2], np.float32)
    expected = [np.nextafter(np.float32(1), np.float32(2)), 1, np.nextafter(np.float32(-1), np.float32(0)), 2 - 2**-22]
    np.testing.assert_array_equal(numbers.moved(x, np.array([1, 0, 1, -2])), np.float32(expected))


def test_every_float():
    (chunk,) = floats.every_float(-1.5, -1.0, 1 << 12)
    assert len(np.unique(chunk)) == 2**10 + 1
    assert (chunk.min(), chunk.max()) == (-1.5, -1.0)
    chunks = list(floats.every_float(1.0, 2.0, 1))
    assert len(np.unique(np.concatenate(chunks))) == 2**23 + 1


@pytest.mark.parametrize("searched", [x for x in ALL if x.long], ids=lambda x: x.label)
def test_a_recipe_gives_the_same_row_in_its_domain(searched, rng):
    kernel = searched.kernel
    point = [long_rows.Recipe.drawn(rng, 100, beside=i > 0) for i in range(len(kernel.arguments))]
    rows = long_rows.row_of(searched, point)
    again = json.loads(json.dumps(long_rows.told(searched, point)))
    for x, y, domain in zip(rows, long_rows.row_of(searched, long_rows.recipes(again)), kernel.domains, strict=False):
        assert (x.shape, x.dtype) == ((100,), np.float32)
        np.testing.assert_array_equal(x, y)
        if domain != LOGIT:
            assert x.min() >= 0
            assert x.sum(dtype=float) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", long_rows.KINDS)
def test_differences_of_a_recipes_logits_are_exact(kind):
    x = long_rows.Recipe(1000, kind, seed=1, scale=10.0, ahead=25.0, at=500, offset=-999.3).logits(None)
    np.testing.assert_array_equal(x.astype(np.float32), x)
    differences = x[:, None] - x
    np.testing.assert_array_equal(differences.astype(np.float32), differences)
    assert len(np.unique(x)) <= {"equal": 2, "two levels": 3, "two halves": 3, "few above": 3}.get(kind, 1000)


# Stored arguments


def test_stored_floats_are_read_back_exactly(rng):
    x = rng.integers(0, 0x7F000000, 10_000).astype(np.int32).view(np.float32)
    np.testing.assert_array_equal(np.array(corpus.stored(x), np.float32), x)
    searched = BY_LABEL["kl_divergence_with_logits"]
    points = arguments.fresh(rng, arguments.kinds(searched, True), (1, 3))
    told = corpus.told(searched, f"{HVP}, p_logits", [x[0] for x in points])
    assert all(np.array_equal(x, y[0]) for x, y in zip(corpus.point(searched, told), points, strict=True))
    assert set(corpus.told(searched, "value", [x[0] for x in points])) == {"p_logits", "q_logits"}


def test_a_known_argument_is_measured_again():
    """The error is measured again, whatever the line says. The argument is kept, unless larger errors are found."""
    searched = BY_LABEL["binary_kl_divergence_with_logits"]
    at = {"alpha_logits": 14.066157341003418, "beta_logits": 14.056715965270996}
    known = child.line(searched, "∂beta_logits", child.ANY, "CPU", [{"ulps": 1000.0, "at": at}])
    lines = child.lines_of(searched, todo(quick=False, seconds=0.0), [known])
    (line,) = [line for line in lines if line["quantity"] == "∂beta_logits"]
    assert 0 < line["worst"][0]["ulps"] < 1000
    assert len({str(x["at"]) for x in line["worst"]}) == corpus.KEPT
    assert line["worst"][0]["by_mpmath"] == pytest.approx(line["worst"][0]["ulps"], abs=0.01)


def test_known_arguments_of_xlas_functions_are_measured_again():
    """At 0.41471332 log1p is off by 2.52 ulps; a search with a stride misses this number."""
    known = {"function": "log1p, above 0", "worst": [{"ulps": 9.0, "at": {"x": 0.41471332}}]}
    (line,) = child.lines_of_elementary("log1p, above 0", todo(), [known])
    (strided,) = child.lines_of_elementary("log1p, above 0", todo(), [])
    assert 9 > line["worst"][0]["ulps"] >= strided["worst"][0]["ulps"] > 1


@pytest.mark.slow
def test_a_run_continues_from_the_last_run(tmp_path, capsys):
    command = ["search", "--quick", "--of", "sampled_kl_divergence", "--out", str(tmp_path)]
    path = tmp_path / "search-cpu-quick.jsonl"
    assert main(command) == 0
    first = results.read(path)
    assert {line["quantity"] for line in first} == {"value", "∂log_p", "∂log_q"}
    assert {line["environment"]["settings"]["seed"] for line in first} == {0}
    assert main([*command, "--seed", "1", "--compare", str(path)]) == 0
    assert "Moved beyond the noise" in capsys.readouterr().out
    for old, new in zip(first, results.read(path), strict=True):
        assert corpus.worst(new) >= corpus.worst(old)


# The oracle and the scales


def drawn(searched: Searched, rng, count: int, off_grid: bool = False):
    shape = (count, 3) if searched.kernel.has_classes else (count,)
    points = arguments.fresh(rng, arguments.kinds(searched, off_grid), shape)
    k = len(searched.kernel.arguments)
    return points[:k], points[k:]


@each_searched
@pytest.mark.in_turn(12)
def test_the_oracle_is_right(searched, rng):
    """The function in float64 agrees with the formula in mpmath to far less than an ulp of float32."""
    first, directions = drawn(searched, rng, 4)
    for quantity, found in judged(searched, first, directions).items():
        for row, place in np.ndindex(4, found.errors[0].size):
            exact, ulp, counts = (np.reshape(x, (4, -1))[row, place] for x in (found.exact, found.ulp, found.counts))
            if counts:
                truth = by_mpmath(searched, quantity, [x[row] for x in (*first, *directions)], place)
                assert not mp.isfinite(truth) or abs(exact - truth) < 1e-5 * ulp, (quantity, row, place)


@each_searched
def test_scales_equal_the_tables(searched, rng):
    kernel, known = searched.kernel, SCALES.get(searched.key, {})
    first, _ = drawn(searched, rng, 8)
    of_table = [kernel.value_scale, *kernel.gradient_scale[: len(kernel.arguments)]]
    of_table = dict(zip(["value", *(f"∂{name}" for name in kernel.arguments)], of_table, strict=True))
    arrays = [x.astype(float) for x in first]
    with np.errstate(all="ignore"):
        found = {name: np.asarray(scale(*arrays)) for name, scale in known.items() if name != HVP}
    assert set(found) == {name for name in of_table if of_table[name] and name in searched.quantities}
    for row in range(8):
        exact = oracle.to_mp([x[row] for x in first])
        with oracle.precision(kernel, [x[row] for x in first]):
            inside = all(x for _, _, x in oracle.entries(exact)) or LOGIT in kernel.domains
            for name in found if inside else ():
                np.testing.assert_allclose(found[name][row], np.array(of_table[name](*exact), float), rtol=1e-7)


@pytest.mark.parametrize("searched", [x for x in ALL if x.hvp], ids=lambda x: x.label)
def test_scales_of_second_order(searched, rng):
    """The scales equal the table's, or Σ |Hᵢⱼ vⱼ|. For the entropy, whose Hᵢⱼ are differences, they may be larger."""
    kernel = searched.kernel
    first, directions = drawn(searched, rng, 4)
    arrays = [x.astype(float) for x in (*first, *directions)]
    found = [np.reshape(x, (4, -1)) for x in SCALES[searched.key][HVP](*arrays)]
    for row in range(4):
        with oracle.precision(kernel, [x[row] for x in first]):
            exact, along = (oracle.to_mp([x[row] for x in some]) for some in (first, directions))
            entries = [(i, j, x or mp.mpf(1)) for i, j, x in oracle.entries(exact)]
            by_entry = [found[i][row, j] for i, j, _ in entries]
            if kernel.hvp_scale:
                truth = [x for of in kernel.hvp_scale(*exact, *along) for x in of]
            else:
                tangents = [t for _, _, t in oracle.entries(along)]
                rows = oracle.hessian(kernel.formula, exact, entries)
                truth = [sum(abs(h * t) for h, t in zip(of, tangents, strict=True)) for of in rows]
        truth = np.array([float(x) for x in truth])
        assert np.all(truth * (1 - 1e-7) <= np.add(by_entry, 1e-100))
        if kernel.name != "entropy_with_logits":
            np.testing.assert_allclose(by_entry, truth, rtol=1e-7, atol=1e-100)


@pytest.mark.parametrize("searched", [x for x in ALL if x.of_logits], ids=lambda x: x.label)
@pytest.mark.parametrize("n", [2, 3])
def test_the_effect_of_rounding_a_logit(searched, n, rng):
    """The effect is at least the table's. It is larger for three classes, where two terms count, and for two rows."""
    kernel = searched.kernel
    first, _ = drawn(searched, rng, 8, off_grid=True)
    first = [x[:, :n] for x in first]
    arrays = [x.astype(float) for x in first]
    with np.errstate(all="ignore"):
        of_row, of_each = (conditioning(kernel, arrays, each) for each in (False, True))
    for row in range(8):
        exact = oracle.to_mp([x[row] for x in first])
        truth = [oracle.conditioning(kernel, exact, np.float32, j) for j in (None, *range(n))]
        found = [of_row[row], *of_each[row]]
        assert np.all(np.array(found) >= np.array(truth) * (1 - 1e-6))
        if n == 2 and kernel.domains.count(LOGIT) == 1:
            np.testing.assert_allclose(found, truth)


def test_equal_logits_have_no_rounding_error():
    x = np.array([[60.1, 58.2, 3.0]], np.float32).astype(float)
    lost = lost_of_differences("kl_divergence_with_logits", [x, x], {"∂q_logits": np.zeros_like(x)})
    assert all(np.all(amount == 0) for amount in lost.values())
    assert deviance(np.array(0.25), np.array(0.5)) == pytest.approx(0.25 - 0.25 * np.log(2))


def test_the_readme_states_the_bars():
    """The README states the bars for values and first derivatives on a CPU."""

    def most(*names):
        return max(bar for name in names for bar in BARS[name][:2])

    tail, jensen_shannon, kl = "log_probs_with_integer_labels, tail", "jensen_shannon_divergence", "kl_divergence"
    few, whole, in_blocks = min(FEW), MANY, min(n for n in LONG if n > LONGEST_ROW)
    all_functions = most("rows", "elementwise", "binary_kl_divergence_with_logits")
    of_kl, of_tails = most(kl, f"generalized_{kl}", f"{kl}_with_logits"), most(tail)
    of_both = most(jensen_shannon, f"{jensen_shannon}_with_logits")
    said = (
        f"| {few} to {max(FEW)} | {all_functions} | {all_functions} |"
        f" KL {of_kl}, Jensen–Shannon {of_both}, tails {of_tails} |",
        "| {:,} to {:,} | {} | {} | tails {} |".format(
            whole, max(n for n in LONG if n <= LONGEST_ROW), *BARS[WHOLE], most(f"{tail}, {WHOLE}")
        ),
        "| {:,} to {:,} | {} | {} | tails {} |".format(
            in_blocks, max(LONG), *BARS[IN_BLOCKS], most(f"{tail}, {IN_BLOCKS}")
        ),
    )
    text = (results.FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    assert [x for x in said if x not in text] == []
