"""Tests of the benchmarks: comparisons, counts, printed tables, and the README's figures."""

import dataclasses
import functools
import json
import os
import subprocess
import types

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

import jce
from bench import (
    accelerators,
    accuracy,
    children,
    first_call,
    memory,
    overview,
    peers,
    pictures,
    readme,
    results,
    scale,
    speed,
    tables,
    verify,
)
from bench.__main__ import main
from bench.engines import ALONE, GRADIENT, HVP, MODES, VALUE
from bench.models import MODELS, Model
from bench.peers import TASKS, Task
from bench.search.functions import Searched
from bench.verify import claims, errors, heads, times
from tests.kernels import ROWS


def task(label: str) -> Task:
    return next(t for t in TASKS if t.label == label)


def test_every_function_has_a_task():
    left_out = {"check_distribution", "on_mesh", "Linear"}
    assert {t.name for t in TASKS} == set(jce.__all__) - left_out


@pytest.mark.parametrize("t", TASKS, ids=lambda t: t.label)
@pytest.mark.slow  # without the extra `bench`, few libraries are there
def test_all_libraries_do_the_same(t, rng):
    """On ordinary arguments, all libraries return the same values. This finds wrong functions and swapped arguments."""
    arrays = t.sample(rng, 8, 5, 4)
    found = {}
    for library, f in t.contenders().items():
        engine = peers.engine_of(library)
        found[library] = engine.program(f, VALUE, t.trained)(*map(engine.put, arrays))
    assert {"jce", "jax"} <= {library.partition(",")[0] for library in found}
    assert all(speed.same(x, found["jce"]) for x in found.values())


def test_a_missing_library_is_listed_and_skipped(monkeypatch):
    monkeypatch.setitem(peers.LIBRARIES, "optax", (None, peers.JAX))
    assert "optax" in peers.missing()
    assert "optax" not in task("kl_divergence").contenders()


def test_cpu_libraries_are_skipped_on_a_gpu():
    assert not {"torch", "scipy"} & set(task("entropy").contenders("gpu"))


# Accuracy


def test_errors_are_counted():
    truths = [accuracy.Truth(row, 0, mp.mpf(x), mp.mpf(x), 0.5) for row, x in enumerate((1, 1, 2, 4, 1e-300))]
    got = np.array([[1.0], [np.nan], [-2.0], [0.0], [5.0]], np.float32)
    (statistics,) = accuracy.judged(["a"] * 5, truths, got, np.float32).values()
    assert statistics["of"] == 4  # a result below the normal range is not counted
    assert (statistics["nan"], statistics["wrong sign"], statistics["zero"]) == (1, 1, 1)
    assert statistics["max"] == statistics["beyond"] == np.inf


def test_a_wrong_function_is_reported_to_disagree(monkeypatch):
    t = task("binary_entropy")
    monkeypatch.setitem(t.functions, "jax", lambda alpha: 1.01 * jce.binary_entropy(alpha))
    agrees = {(x["library"], x["quantity"]): x["agrees"] for x in accuracy.measure(t, 1, np.float32)}
    assert agrees["jce", "value"]
    assert not agrees["jax", "value"]
    assert not agrees["jax", "∂alpha"]


def test_an_error_beyond_its_bar_is_found(monkeypatch):
    t = task("binary_entropy")
    monkeypatch.setitem(t.functions, "jce", lambda alpha: (1 + 1e-5) * jce.binary_entropy(alpha))
    lines = list(accuracy.measure(t, 1, np.float32))
    with pytest.raises(AssertionError, match="binary_entropy"):
        accuracy.check(lines)


# Speed


def test_interleaved_returns_one_time_per_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = speed.interleaved(calls, dict.fromkeys("ab", lambda result: None), 4, 0.0)
    assert order[-8:] == list("abababab")
    assert all(x.shape == (4,) and (x >= 0).all() for x in seconds.values())


def test_matmuls_of_the_floor_of_heads(rng):
    """`seven_products` returns the derivative of `three_products`, the matmuls of the gradient, along a direction."""
    h, w, dh, dw = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (5, 3), (4, 3), (5, 3)))
    _, expected = jax.jvp(lambda h, w: speed.three_products(None, h, w), (h, w), (dh, dw))
    for x, e in zip(speed.seven_products(None, h, w, dh, dw), expected, strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-5)


@pytest.mark.parametrize(("mode", "products"), [(VALUE, 2), (GRADIENT, 4), (HVP, 8)])
def test_the_floor_of_two_heads_has_one_more_matmul(mode, products):
    t = task("linear_kl_divergence")
    shapes = t.shapes(8, 5, 4)
    shapes += [shapes[i] for i in t.trained] if mode == HVP else []
    text = str(jax.make_jaxpr(speed.floor(t, mode))(*(jax.ShapeDtypeStruct(*s) for s in shapes)))
    assert text.count("dot_general") == products


@pytest.mark.needs_jit
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "label",
    ["cross_entropy_with_integer_labels", "linear_cross_entropy", "linear_kl_divergence", "binary_kl_divergence"],
)
@pytest.mark.slow
def test_lines_of_speed(label, mode):
    settings = speed.Settings(label, (), 2**10, 2**14, 3, 0.0)
    lines = speed.measure(task(label), MODELS[0], mode, settings)
    assert {"jce", "jax"} <= {line["library"].partition(",")[0] for line in lines}
    for line in lines:
        assert line["agrees"] is True or str(line["agrees"]).startswith("can't")
        if "seconds" in line:
            assert line["seconds"] == sorted(line["seconds"])
            assert line["over_floor"][1] > 0


# Memory and scale


def test_exponent_of_a_power():
    sizes = [10, 100, 1000]
    assert memory.exponent(sizes, [3 * n**2 for n in sizes]) == 2
    assert memory.exponent(sizes, [0, 5, 100], memory.PAGE) == 0


@pytest.mark.needs_jit
@pytest.mark.slow
def test_lines_of_growth():
    (t,) = [t for t in TASKS if t.label == "linear_cross_entropy"]
    lines = memory.growth(t, "tokens", [2048, 4096, 8192], (VALUE, GRADIENT))
    memory.check(lines)
    slopes = {(x["library"], x["mode"]): x["exponent"] for x in lines}
    assert slopes["jax", VALUE] > 0.9
    scale_lines = scale.measure(t, "classes", [10, 100, 1000], 3)
    assert {"jce", "jax"} <= {x["library"] for x in scale_lines}


@pytest.mark.needs_jit
def test_lines_of_a_first_call():
    (t,) = [t for t in TASKS if t.label == "entropy_with_logits"]
    lines = first_call.measured(t, GRADIENT, 1)
    first_call.check(lines)
    assert {"jce", "jax"} <= {line["library"] for line in lines}
    for line in lines:
        assert line["first_call"] == pytest.approx(sum(line[step] for step in first_call.STEPS))
        assert line["jce_over_it"] == pytest.approx(lines[0]["first_call"] / line["first_call"])
    (line,) = [line for line in first_call.measured(first_call.POLICY, VALUE, 1) if line["library"] == "jce"]
    assert all(line[step] > 0 for step in first_call.STEPS)


# Accelerators


def test_the_floor_of_losses_reads_and_writes_once():
    """The floor is that of the library whose compiled program has the fewest arguments."""
    case = accelerators.Case("v5e", "entropy_with_logits", "ResNet-50", ())
    what = accelerators.measured(case)
    shape = f"f32[{what.shape[0]},{what.shape[1]}]{{1,0:T(8,128)}}"
    lines = f"  %x = {shape} parameter(0)\n  %y = {shape} parameter(1)\n  ROOT %z = {shape} add(%x, %y)"
    three = f"ENTRY %main () -> f32[] {{\n{lines}\n}}"
    two = three.replace(f"  %y = {shape} parameter(1)\n", "").replace("%y", "%x")
    a_pass = 4 * np.prod(what.shape) / 0.82e12
    assert accelerators.floor(what, HVP, "v5e", [three]) == pytest.approx(3 * a_pass)
    assert accelerators.floor(what, ALONE, "v5e", [three, two]) == pytest.approx(2 * a_pass)


@pytest.mark.parametrize(
    ("label", "gradient", "hvp"),
    [("linear_cross_entropy", 3, 7), ("linear_map", 3, 7), ("linear_kl_divergence", 4, 8)],
)
def test_the_floor_of_heads_is_the_time_of_their_matmuls(label, gradient, hvp):
    what = accelerators.measured(accelerators.Case("h100", label, "Llama 3.1 8B", ()))
    product = 2 * 8192 * 4096 * 128_256 / 989e12
    assert accelerators.floor(what, GRADIENT, "h100", []) == pytest.approx(gradient * product)
    assert accelerators.floor(what, HVP, "h100", []) == pytest.approx(hvp * product)


@pytest.mark.parametrize("label", accelerators.HEAD_FUNCTIONS)
@pytest.mark.in_turn(3)
def test_compared_heads_have_the_same_loss(label, rng):
    what = accelerators.measured(accelerators.Case("h100", label, "Llama 3.1 8B", ()))
    sample = task(label).sample(rng, 8, 5, 4)
    arrays = [x.astype(dtype) for x, (_, dtype) in zip(sample, what.arguments, strict=True)]
    expected = what.functions["jce"](*arrays)
    for name in set(what.functions) - {"tokamax", "jax-cce"}:
        np.testing.assert_allclose(np.float32(what.functions[name](*arrays)), expected, rtol=0.02)


def test_a_quick_run_has_two_devices_and_few_programs():
    assert {case.device for case in accelerators.cases(True, "")} == {"h100", "v5e"}
    assert len(accelerators.cases(True, "")) == 4
    every = {case.function for case in accelerators.cases(False, "")}
    assert every == {t.label for t in TASKS}


COMPILED = {
    "bench": "accelerators",
    "function": "f",
    "library": "jce",
    "mode": VALUE,
    "model": "digits",
    "device": "h100",
    "passes": 2.0,
    "bytes": 100,
    "roofline": 4e-3,
    "roofline_over_floor": 2.0,
    "cycles": 0,
    "kernels": 3,
    "temporaries": 8,
}
SLOWER = COMPILED | {"library": "jax", "roofline": 8e-3, "roofline_over_floor": 4.0}
FASTER = COMPILED | {"library": "optax, float32 logits", "roofline": 2e-3, "roofline_over_floor": 1.0}
CANNOT = {key: COMPILED[key] for key in ("bench", "function", "mode", "model", "device")} | {"cannot": "TypeError"}


def test_jce_is_compared_with_the_fastest_library(tmp_path):
    lines = [COMPILED, SLOWER, FASTER, CANNOT | {"library": "tokamax"}, COMPILED | {"device": "v5e"}]
    h100, v5e = tables.TABLES["accelerators"](lines)
    cells = [next(iter(column.cells)) for column in h100.columns]
    assert cells[:7] == ["f, digits, value", "2", "optax, float32 logits", "2", "2.00", "1.00", "2.00"]
    assert cells[-1] == "tokamax"
    assert [next(iter(column.cells)) for column in v5e.columns][2:4] == ["–", "–"]
    for kind, shape in (("heads", [8, 4, 5]), ("losses", [8, 1000])):
        shown = [line | {"mode": GRADIENT, "shape": shape} for line in lines]
        pictures.PICTURES["accelerators"](shown, tmp_path / "x.png")
        assert (tmp_path / f"x-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_results_have_no_noise_and_are_compared_per_device():
    worse = COMPILED | {"roofline_over_floor": 2.05}
    assert moved(COMPILED, worse) == [("roofline / floor", 2.0, 2.05)]
    assert moved(COMPILED, worse | {"device": "v5e"}) == []
    assert moved(COMPILED, CANNOT | {"library": "jce"}) == []


def test_impossible_costs_and_missing_results_are_errors():
    head = COMPILED | {"function": "linear_kl_divergence", "mode": HVP, "shape": [8, 4, 5]}
    whole, a_product_less = (head | {"operations": {"bf16": products * 2 * 8 * 4 * 5}} for products in (8, 7))
    accelerators.check([COMPILED, CANNOT | {"library": "tokamax"}, whole])
    for line in (COMPILED | {"roofline_over_floor": 0.9}, CANNOT | {"library": "jce"}, a_product_less):
        with pytest.raises(AssertionError):
            accelerators.check([line])


def test_missing_compilers_are_reported_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerators, "missing", lambda: ["jax[tpu]"])
    assert main(["accelerators", "--out", str(tmp_path)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "accelerators" in x]
    assert line == "accelerators needs jax[tpu]: pip install -e '.[bench,accelerators]'"


@pytest.mark.needs_jit
@pytest.mark.skipif(bool(accelerators.missing()), reason="the compilers aren't installed")
def test_lines_of_accelerators():
    count, *found = accelerators.run(True, "binary_entropy_with_logits")
    assert int(count[0]) == len(found) == 4
    lines = [line for _, some in found for line in some]
    accelerators.check(lines)
    assert {(x["device"], x["mode"]) for x in lines} == {(d, m) for d in ("h100", "v5e") for m in (VALUE, GRADIENT)}
    values = {x["device"]: x for x in lines if x["library"] == "jce" and x["mode"] == VALUE}
    assert values["h100"]["passes"] == 2  # one array is read and one is written
    assert (values["h100"]["cycles"], values["v5e"]["cycles"] > 0) == (0, True)


def test_a_failed_child_raises_and_prints_its_error(capfd):
    with pytest.raises(subprocess.CalledProcessError):
        list(children.lines("bench.accelerators", [["h100", "nothing", "digits", ["value"]]], dict(os.environ), True))
    assert "StopIteration" in capfd.readouterr().err


# Results


LINE = {"bench": "speed", "function": "f", "library": "jce", "mode": "value", "over_floor": [1.0, 1.1, 1.2]}
ULPS = {"bench": "accuracy", "function": "f", "library": "jce", "regimes": {"a": {"median": 0.1, "max": 1.5}}}

SEARCH = {
    "bench": "search",
    "function": "f",
    "library": "jce",
    "arguments": "any",
    "worst": [{"ulps": 4.0}, {"ulps": 3.0}],
}


def moved(old, new):
    return [(name, before, now) for _, name, before, now in results.moved([old], [new])]


def test_moved_results():
    assert moved(LINE, LINE | {"over_floor": [1.1, 1.2, 1.3]}) == []  # the quartiles overlap
    assert moved(LINE, LINE | {"over_floor": [1.201, 1.205, 1.21]}) == []  # the change is less than a tenth
    assert moved(LINE, LINE | {"over_floor": [1.3, 1.4, 1.5]}) == [("time / floor", 1.1, 1.4)]
    assert moved(LINE, LINE | {"library": "other", "over_floor": [9.0] * 3}) == []
    assert moved(SEARCH, SEARCH | {"worst": [{"ulps": 6.5}]}) == [("largest ulps", 4.0, 6.5)]
    assert moved(SEARCH, SEARCH | {"worst": []}) == [("largest ulps", 4.0, 1.0)]
    assert moved(SEARCH, SEARCH | {"arguments": "off the grid", "worst": [{"ulps": 9.0}]}) == []
    assert moved(ULPS, ULPS | {"regimes": {"a": {"median": 0.1, "max": None}}}) == [("ulps, a", 1.5, np.inf)]


def test_lines_are_strict_json_and_can_be_read_back(tmp_path):
    path = tmp_path / "x.jsonl"
    results.write([LINE | {"infinite": np.inf, "worst": [{"ulps": np.inf}]}], path)
    (line,) = path.read_text().splitlines()
    json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    assert results.read(path) == [LINE | {"infinite": None, "worst": [{"ulps": None}]}]
    assert results.merged([LINE], [LINE | {"over_floor": [2.0] * 3}]) == [LINE | {"over_floor": [2.0] * 3}]


def test_results_record_their_environment():
    line = results.complete({"library": "optax"}, "speed", results.environment({"quick": True}))
    assert {"commit", "device", "python", "jax", "settings", "optax"} <= set(line["environment"])


# The command


@pytest.mark.slow
def test_a_run_writes_a_table_lines_and_a_picture(tmp_path, capsys):
    arguments = ["accuracy", "--quick", "--only", "binary_kl_divergence", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "accuracy-cpu-quick.jsonl"
    assert "binary_kl_divergence: ∂beta" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--compare", str(path)]) == 0
    assert "Moved beyond the noise" in capsys.readouterr().out


def test_a_benchmark_without_the_requested_function(tmp_path, capsys):
    assert main(["memory", "--quick", "--only", "binary_entropy", "--out", str(tmp_path)]) == 0
    assert "memory: this benchmark has no function with 'binary_entropy' in its name" in capsys.readouterr().out


# Verification of the claims on this device

H100, V5E, A100 = "NVIDIA H100 80GB HBM3", "TPU v5 lite", "NVIDIA A100-SXM4-40GB"


def on(device: str, lines: list[dict]) -> list[dict]:
    return [line | {"environment": {"device": device, "jax": "0", "driver": "PJRT 1"}} for line in lines]


def verdicts(found, lines: list[dict]) -> dict[str, list]:
    (claim,) = [claim for claim in claims.CLAIMS if claim.found is found]
    verdicts = {}
    for x in found(lines):
        verdicts.setdefault(x.of, []).append(claim.holds(x))
    return verdicts


def test_verify_prints_results_and_the_file_to_send(tmp_path, capsys):
    assert main(["verify", "--quick", "--only", "binary_kl_divergence", "--out", str(tmp_path)]) == 0
    path = tmp_path / "verify-cpu-quick.jsonl"
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(f"{verify.TO_SEND}: {path}")
    assert f"On CPU, {os.cpu_count()} cores, JAX {jax.__version__}" in printed
    lines = results.read(path)
    verify.check(lines)
    assert {line["quantity"] for line in lines if "ulps" in line} == {"value", "∂alpha", "∂beta"}
    (corners,) = [line for line in lines if "wrong" in line]
    assert corners["of"] == 3 * len(ROWS["binary_kl_divergence"].corners)


def test_verify_prints_no_empty_column_or_count():
    corners = {"function": "f", "library": "jce", "wrong": 0, "of": 3, "at": []}
    optax = {"function": "f", "library": "optax", "model": "m", "mode": "value", "seconds": [1, 1, 1]}
    lines = on(A100, [corners, optax | {"jce_over_it": [1.0, 1.1, 1.2], "shape": [1]}])
    printed = {table.title: table for table in tables.TABLES["verify"](lines)}
    headers = {title: [str(column.header) for column in table.columns] for title, table in printed.items()}
    assert headers["Time divided by optax's"] == ["function", "measured", "detail"]  # there are no claims for an A100
    assert "Nothing is claimed" in printed["Time divided by optax's"].caption
    assert headers["At 0, 1, ±∞ and NaN: entries that differ from the docstrings"][-1] == "holds"
    held = dict(zip(*(column.cells for column in printed["What holds"].columns), strict=True))
    assert "Time divided by optax's" not in held
    assert set(held.values()) == {"1 of 1"}


def test_an_accelerator_has_its_own_bounds():
    line = {"function": "linear_cross_entropy", "library": "jce", "quantity": "value", "arguments": "any", "ulps": 9.0}
    assert verdicts(claims.of_ulps, on("CPU, 2 cores", [line])) == {"linear_cross_entropy": [False]}
    assert verdicts(claims.of_ulps, on(H100, [line])) == {"linear_cross_entropy": [True]}


def test_the_claims_fail_for_an_inaccurate_function(monkeypatch):
    def textbook(x):
        return jax.nn.logsumexp(x, axis=-1) - x[..., 0]

    label = "cross_entropy_with_integer_labels"
    wrong = dataclasses.replace(ROWS[label], function=functools.wraps(ROWS[label].function)(textbook))
    monkeypatch.setitem(ROWS, label, wrong)
    lines = [*errors.function_errors(Searched(wrong)), *errors.corner_errors(label)]
    assert not any(verdicts(claims.of_ulps, lines)[label])
    assert list(verdicts(claims.of_corners, lines).values()) == [[False]]
    with pytest.raises(AssertionError, match="A float32 value or first derivative"):
        verify.check(on("CPU, 2 cores", lines))
    verify.check(on(H100, lines))  # the check is only for CPUs


@pytest.mark.parametrize("name", heads.LOSSES_OF_HEADS)
@pytest.mark.in_turn(7)
def test_heads_are_close_to_float64(name):
    assert verdicts(claims.of_heads, heads.head_errors(name, tokens=256, n=100)) == {name: [True] * 3}


def test_the_claims_fail_for_a_wrong_head(monkeypatch):
    loss = jce.linear_cross_entropy
    monkeypatch.setattr(jce, "linear_cross_entropy", lambda *args, **options: (1 + 1e-5) * loss(*args, **options))
    lines = heads.head_errors("linear_cross_entropy", tokens=256, n=100)
    assert verdicts(claims.of_heads, lines) == {"linear_cross_entropy": [False] * 3}
    rounded = heads.head_errors("linear_cross_entropy", jnp.bfloat16, tokens=256, n=100)
    assert verdicts(claims.of_heads, rounded) == {"linear_cross_entropy, bfloat16": [False, True, True]}


@pytest.mark.needs_jit
def test_verify_on_accelerators():
    """The programs for accelerators, run here with few tokens: results agree, and each device's claims are found."""
    asked, of_heads = times.timed(False, "gpu"), {"linear_cross_entropy", "linear_map", "linear_kl_divergence"}
    assert {x.task.label for x in asked} == set(times.LOSSES) | of_heads
    (chunked,) = [x for x in asked if len(x.task.functions) > 2]
    few = speed.Settings("", (), 2**10, 0, 2, 0.0)
    small = Model(chunked.model.name, 50, 16, 64)
    lines = speed.measure(*chunked._replace(model=small, settings=few))
    assert all(line["agrees"] is True and line["temporaries"] > 0 for line in lines)
    whole = [line | {"shape": [8192, 2048, 128_256]} for line in lines]
    known = [claims.of_temporaries, claims.of_products, claims.of_optax, claims.of_chunks]
    for device, count in ((H100, 4), (V5E, 4), (A100, 1)):
        said = [x.said for found in known for x in found(on(device, whole))]
        assert sum(x is not None for x in said) == count
        assert verdicts(claims.of_temporaries, on(device, whole)) == {
            "linear_cross_entropy, Llama 3.2 1B, value and gradient": [None if device == A100 else True]
        }
        printed = tables.TABLES["verify"](on(device, whole))
        assert all(f"On {device}, JAX 0, PJRT 1" in table.caption for table in printed)


def test_programs_for_accelerators_have_published_results():
    for x in times.timed(False, "tpu"):
        of = {"function": x.task.label, "model": x.model.name, "mode": x.mode}
        for name in x.task.functions:
            known = {claims.compiled(line | {"library": name}).get("mode") for line in on(V5E, [of])}
            assert known == {None if "chunks" in name else x.mode}


def test_an_accelerators_runtime_and_driver_are_recorded(monkeypatch):
    device = types.SimpleNamespace(client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 12090"))
    asked = types.SimpleNamespace(stdout="580.65.06\n580.65.06\n")  # for two GPUs
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: asked)
    assert results.driver(device) == "PJRT C API cuda 12090, 580.65.06"


def test_a_hidden_cpu_is_reported_in_one_line(monkeypatch, capsys):
    def hidden():
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(verify, "on_host", hidden)
    with pytest.raises(SystemExit) as stop:
        main(["verify"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "needs JAX's CPU platform for float64" in error
    assert error.count("\n") == 1


def test_a_failure_is_reported_and_other_checks_run(monkeypatch):
    def fails(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(verify, "corner_errors", fails)
    lines = [line for _, some in verify.run(True, "binary_kl_divergence") for line in some]
    assert any("ulps" in line for line in lines)
    (found,) = claims.of_failures(lines)
    assert (found.measured, found.said) == (1, 0)
    assert "edge cases of binary_kl_divergence: RESOURCE_EXHAUSTED" in found.detail


def test_the_readmes_bounds_relative_to_optax():
    text = (results.FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    for name, bound in claims.OVER_OPTAX.items():
        assert f"| `{name}` | {bound} |" in text


# The README


def test_the_readmes_figures_match_the_results():
    text = readme.README.read_text(encoding="utf-8")
    assert set(readme.TABLES) == {name for _, name, _ in readme.BLOCK.findall(text)}
    assert readme.rendered(text) == text, "run python -m bench.readme"


def test_the_picture_has_its_panels():
    names = {t.label for t in TASKS}
    assert all(function in names for function, _, _ in pictures.PANELS)


@pytest.mark.slow
def test_the_overview(tmp_path, optax_promotes):
    """Both steps compute the same, and jce's needs less memory. At large margins optax's loss is 0, but jce's isn't."""
    words, labels = np.arange(6).reshape(2, 3), np.arange(1, 7).reshape(2, 3)
    params = {"table": jax.random.normal(jax.random.key(0), (32, 4)), "dense": jnp.eye(4)}
    ours, theirs = (
        jax.value_and_grad(functools.partial(overview.loss, name))(params, words, labels) for name in overview.STYLES
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)
    of_step = {n: overview.costs(n, steps=1) for n in (512, 2048)}
    assert of_step[2048]["jce"].megabytes < of_step[2048]["optax"].megabytes
    margins = np.linspace(0, 80, 33)
    losses = overview.surprisals(margins)
    assert (losses["jce"] > 0).all()
    assert (losses["optax"] == 0).any()
    overview.picture(of_step, margins, losses).savefig(tmp_path / "overview.png")
