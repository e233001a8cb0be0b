"""Each notebook runs, its claim holds, and the rendered notebook equals the script."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jupytext
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
NAMES = [
    "0_switch",
    "1_conventions",
    "2_simplex",
    "3_confidence",
    "4_big_vocabulary",
    "5_devices",
    "6_distillation",
    "7_policy",
    "8_trainers",
]
MARKS = {
    "6_distillation": [pytest.mark.long],
    "8_trainers": [
        pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="needs the extra 'trainers'"),
        pytest.mark.long,
    ],
}

each_notebook = pytest.mark.parametrize("name", NAMES)


def test_every_notebook_is_here():
    assert [path.stem for path in sorted(FOLDER.glob("*.py"))] == NAMES
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == NAMES


@pytest.mark.needs_jit  # trains models, and prints the memory of compiled programs
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in NAMES])
@pytest.mark.slow
def test_runs(name):
    """The last cell asserts the claim of the first line."""
    environment = {**os.environ, "MPLBACKEND": "agg"}
    environment.pop("XLA_FLAGS", None)  # tests/conftest.py sets it
    script = FOLDER / f"{name}.py"
    done = subprocess.run([sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_notebook
def test_is_rendered_from_its_script(name):
    script, notebook = (jupytext.read(FOLDER / f"{name}.{kind}") for kind in ("py", "ipynb"))
    cells = notebook.cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in script.cells], (
        "rendered from an earlier script: run the README's command for notebooks"
    )
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_is_short_and_makes_a_claim(name):
    cells = jupytext.read(FOLDER / f"{name}.ipynb").cells
    assert len(cells) <= 20
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 150_000
    title, claim = cells[0].source.splitlines()[0].split(": ", 1)
    assert title.startswith("# ")
    assert claim
    assert "\nassert " in "\n" + cells[-1].source
    assert cells[-1].outputs[0].text.strip()
