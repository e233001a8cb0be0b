"""What all programs do when they are interrupted: they end at once, with one line, whatever they are doing."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

# Imports, in the place of a package that the program needs, and stays there.
STAYS = "import sys, time\nprint(end='importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"

# A program, its arguments, what to put in a package's place, and what it says before it is interrupted
CASES = {
    "while it imports": ("jce.demo", [], "matplotlib", "importing"),
    "while it imports, bench": ("bench", [], "rich", "importing"),
    "within a compiled loop of a minute": ("jce.next_word", ["TEXT", "--steps", "100000"], None, "\n        0"),
    "between steps": ("jce.max_margin", ["--steps", "1000000"], None, "Normalized gradient"),
    "while it compiles": ("jce.demo", ["--optimizer", "sgd"], None, "perplexity: exp"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_interrupt(case, tmp_path):
    program, arguments, package, says = CASES[case]
    (tmp_path / "TEXT").write_text(" ".join(f"w{i * i % 997}" for i in range(30_000)))
    if package:
        (tmp_path / f"{package}.py").write_text(STAYS)
    root = str(pathlib.Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-u", "-W", "error", "-m", program, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        said = b""
        while says.encode() not in said:
            said += process.stdout.read1()
            assert process.poll() is None, said.decode()
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=2) == 130
        finally:
            process.kill()
        rest = process.stdout.read().decode()
    assert "Traceback" not in rest
    assert rest.endswith("interrupted\n")
