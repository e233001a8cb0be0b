"""How all programs end: with one line when they are interrupted, whatever they are doing; and when nobody reads on."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = str(pathlib.Path(__file__).parents[1])

# Imports, in the place of a package that the program needs, and stays there.
STAYS = "import sys, time\nprint(end='importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"

# A program, its arguments, what to put in a package's place, and what it says before it is interrupted
PROGRAMS = (
    "jce.demo",
    "jce.next_word",
    "jce.max_margin",
    "jce.distill",
    "bench",
    "bench.devices",
    "bench.overview",
    "bench.pages",
)
CASES = {f"while its package is imported, {program}": (program, [], "jax", "importing") for program in PROGRAMS}
QUICK = set(CASES)
CASES |= {
    "while it imports": ("jce.demo", [], "matplotlib", "importing"),
    "while it imports, bench": ("bench", [], "rich", "importing"),
    "within a compiled loop of a minute": ("jce.next_word", ["TEXT", "--steps", "100000"], None, "\n        0"),
    "between steps": ("jce.max_margin", ["--steps", "1000000"], None, "Normalized gradient"),
    "while it compiles": ("jce.demo", ["--optimizer", "sgd"], None, "perplexity: exp"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="ignored in the background of a shell")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_interrupt(case, tmp_path):
    program, arguments, package, says = CASES[case]
    pytest.importorskip("material" if program == "bench.pages" else "optax", reason="needs the extra 'docs'")
    (tmp_path / "TEXT").write_text(" ".join(f"w{i * i % 997}" for i in range(30_000)))
    if package:
        (tmp_path / f"{package}.py").write_text(STAYS)
    process = subprocess.Popen(
        [sys.executable, "-u", "-W", "error", "-m", program, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])},
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


def without_a_reader(*arguments: str) -> tuple[int, str]:
    """The status, and what is said on stderr, of Python with arguments whose output nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    command, buffered = [sys.executable, "-W", "error", *arguments], os.environ | {"PYTHONUNBUFFERED": ""}
    try:
        run = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writes, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writes)
    return run.returncode, run.stderr


def test_nobody_reads_on():
    """What is written at the end, or before."""
    for main in ("lambda: print(1)", "lambda: print(1, flush=True)", "lambda: sys.exit(print(1))"):
        script = f"import sys; from jce._programs.command_line import run; run({main})"
        assert without_a_reader("-c", script) == (141, ""), main


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.slow
def test_nobody_reads_a_programs_help(program):
    pytest.importorskip("material" if program == "bench.pages" else "optax", reason="needs the extra 'docs'")
    assert without_a_reader("-m", program, "--help") == (141, "")
