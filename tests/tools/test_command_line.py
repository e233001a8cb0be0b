"""Tests of all command lines: errors in one line, help, interrupts, and output that nobody reads."""

import importlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jce._programs import command_line

ROOT = str(pathlib.Path(__file__).parents[2])

MAX_MARGIN, NEXT_WORD, DISTILL = (f"notebooks.examples.{name}" for name in ("max_margin", "next_word", "distill"))

# Each program, and the first function that does its work
PROGRAMS = {
    "jce.demo": "_run",
    NEXT_WORD: "_run",
    MAX_MARGIN: "train",
    DISTILL: "_run",
    "bench": "_run",
    "bench.devices": "check",
    "bench.overview": "costs",
    "bench.pages": "build",
}


def module_of(program: str):
    """The module whose `main` is the program. Skips the test if the program's extra isn't installed."""
    if program == "bench.pages":
        pytest.importorskip("material", reason="needs the extra 'docs'")
    return importlib.import_module(f"{program}.__main__" if program in ("bench", "bench.pages") else program)


# Runs that end before the work begins

FILES = {
    "empty": b"",
    "binary": b"\x89PNG\xff\xfe",
    "nuls": b"a\0b\0c\0",
    "digits": b"1234 !?\n",
    "one": b"a",
    "short": b"to be, or",
}


@pytest.fixture
def ends(tmp_path, monkeypatch, capsys):
    """Calls a program in a folder with FILES, and returns the status, stdout and stderr. The folder must not change."""

    def ends(program: str, *argv: str) -> tuple[int, str, str]:
        module = module_of(program)
        monkeypatch.setattr(module, PROGRAMS[program], lambda *args, **options: pytest.fail("the work began"))
        monkeypatch.setattr(sys, "argv", [program, *argv])
        monkeypatch.setenv("COLUMNS", "999")  # in fewer columns, help would break lines within options
        monkeypatch.chdir(tmp_path)
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "folder.png").mkdir()
        before = set(os.listdir())
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert set(os.listdir()) == before
        return stop.value.code, *capsys.readouterr()

    return ends


BENCHES = "accuracy, search, speed, first-call, memory, scale, accelerators, verify"

# A program, its arguments, and a part of its error
WRONG = [
    ("jce.demo", "missing", "can't read 'missing': No such file or directory"),
    ("jce.demo", "folder.png", "can't read 'folder.png': Is a directory"),
    ("jce.demo", "empty", "'empty' is empty"),
    ("jce.demo", "binary", "'binary' isn't UTF-8 text"),
    ("jce.demo", "nuls", "'nuls' isn't UTF-8 text"),
    ("jce.demo", "digits", "'digits' has no letter from a to z"),
    ("jce.demo", "one", "'one' is a single letter, which nothing follows"),
    *(
        ("jce.demo", f"--steps {x}", f"must be an integer from 1 to 1000000000, not '{x}'")
        for x in ("0", "-1", "1.5", "10000000000")
    ),
    *(
        ("jce.demo", f"--learning-rate {x}", f"must be a positive finite number, not '{x}'")
        for x in ("0", "-1", "nan", "inf", "abc")
    ),
    ("jce.demo", "--seed -1", "must be an integer from 0 to 4294967295, not '-1'"),
    ("jce.demo", "--optimizer newton", "invalid choice: 'newton'"),
    ("jce.demo", "--out nowhere/x.png", "can't write 'nowhere/x.png': there is no folder 'nowhere'"),
    ("jce.demo", "--out folder.png", "can't write 'folder.png': Is a directory"),
    ("jce.demo", "--out /proc/x.png", "can't write '/proc/x.png'"),
    ("jce.demo", "--out x.jpg", "must end in .png, not 'x.jpg'"),
    ("jce.demo", "--steps", "expected one argument"),
    ("jce.demo", "--wrong", "unrecognized arguments: --wrong"),
    (NEXT_WORD, "short", "'short' has 3 words, which is too few to learn from: at least 2000"),
    (NEXT_WORD, "--steps 0", "must be an integer from 1 to 1000000000, not '0'"),
    (MAX_MARGIN, "--steps 0", "must be an integer from 1 to 1000000000, not '0'"),
    (MAX_MARGIN, "--out nowhere/x.png", "can't write 'nowhere/x.png': there is no folder 'nowhere'"),
    (DISTILL, "--out picture.pdf", "must end in .png, not 'picture.pdf'"),
    ("bench", "velocity", f"BENCH must be one of {BENCHES}, not 'velocity'"),
    ("bench", "--only softplus", "must be part of a function's name, not 'softplus'"),
    ("bench", "--compare no.jsonl", "can't read 'no.jsonl': No such file"),
    ("bench", "--compare one", "one, line 1, isn't a line of results"),
    ("bench", "--out one", "can't make the folder 'one': File exists"),
    ("bench", "--fast", "unrecognized arguments: --fast"),
    ("bench.devices", "--flops many", "invalid float value: 'many'"),
    ("bench.overview", "--out picture.pdf", "must end in .png, not 'picture.pdf'"),
    ("bench.pages", "--wrong", "unrecognized arguments: --wrong"),
]


@pytest.mark.parametrize(("program", "argv", "message"), WRONG, ids=[f"{program} {argv}" for program, argv, _ in WRONG])
def test_wrong_input_is_one_line(program, argv, message, ends):
    status, out, err = ends(program, *argv.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"python -m {program}: ")
    assert message in err
    assert err.index("\n") == len(err) - 1


# The options and defaults in a program's help
NAMED = {
    "jce.demo": "TEXT, --optimizer {sgd,nesterov,adam,lbfgs}, --learning-rate, --steps, --seed, --out, (default: 1000)",
    NEXT_WORD: "TEXT, --steps, --seed, (default: 300)",
    MAX_MARGIN: "--steps, --out, (default: 100000)",
    DISTILL: "TEXT, --steps, --seed, --out, (default: 300)",
    "bench": f"{BENCHES}, --quick, --only, --of, --out, --compare, --seconds, --seed, --long-rows",
    "bench.devices": "--flops, --bandwidth, --latency, (default: 4e+14",
    "bench.overview": "--out, overview-cpu.png",
    "bench.pages": "[-h] [FOLDER]",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, ends):
    status, out, err = ends(program, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: python -m {program} ")
    assert [name for name in ("--help", *NAMED[program].split(", ")) if name not in out] == []


# Programs as processes

# A module in place of a package that the program needs. Its import takes a minute.
STAYS = "import sys, time\nprint(end='importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"


def in_folder(folder: pathlib.Path, program: str, *arguments: str) -> dict:
    """Arguments with which `subprocess` runs a program in the folder, whose modules come before installed packages."""
    command = [sys.executable, "-u", "-W", "error", "-m", program, *arguments]
    return {"args": command, "cwd": folder, "env": os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), ROOT])}}


# A program, a package that isn't there, and the arguments for `pip install`
MISSING = [
    ("jce.demo", "optax", "'jce[demo]'"),
    ("jce.demo", "matplotlib", "'jce[demo]'"),
    ("jce.demo", "tqdm", "'jce[demo]'"),
    (NEXT_WORD, "optax", "-e '.[notebooks]'"),
    (MAX_MARGIN, "sklearn", "-e '.[notebooks]'"),
    (DISTILL, "matplotlib", "-e '.[notebooks]'"),
    ("bench", "rich", "-e '.[bench]'"),
    ("bench verify", "mpmath", "-e '.[verify]'"),
    ("bench.pages", "material", "-e '.[docs]'"),
]
ROWS = [pytest.param(*row, marks=[] if row[1] == "sklearn" else pytest.mark.slow) for row in MISSING]


@pytest.mark.parametrize(("program", "package", "install"), ROWS)
def test_missing_extra(program, package, install, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    program, *arguments = program.split()
    run = subprocess.run(**in_folder(tmp_path, program, *arguments), capture_output=True, text=True)
    needs = f"python -m {program} needs {package}, which isn't installed: pip install {install}\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", needs)


@pytest.mark.slow
def test_verify_needs_its_extra_alone(tmp_path):
    for package in ("allpairspy", "chex", "flatbuffers", "hypothesis", "jupytext", "matplotlib", "sklearn", "tqdm"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    arguments = ["verify", "--quick", "--only", "division", "--out", str(tmp_path)]
    run = subprocess.run(**in_folder(tmp_path, "bench", *arguments), capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "What holds" in run.stdout
    assert "installed" not in run.stdout


# A program, its arguments, a package to replace by `STAYS`, and the output after which the program is interrupted
CASES = {f"while its package is imported, {program}": (program, [], "jax", "importing") for program in PROGRAMS}
QUICK = set(CASES)
CASES |= {
    "while it imports": ("jce.demo", [], "matplotlib", "importing"),
    "while it imports, bench": ("bench", [], "rich", "importing"),
    "within a compiled loop of a minute": (NEXT_WORD, ["TEXT", "--steps", "100000"], None, "\n        0"),
    "between steps": (MAX_MARGIN, ["--steps", "1000000"], None, "Normalized gradient"),
    "while it compiles": ("jce.demo", ["--optimizer", "sgd"], None, "perplexity: exp"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="ignored in the background of a shell")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_interrupt(case, tmp_path):
    program, arguments, package, says = CASES[case]
    (tmp_path / "TEXT").write_text(" ".join(f"w{i * i % 997}" for i in range(30_000)))
    if package:
        (tmp_path / f"{package}.py").write_text(STAYS)
    process = subprocess.Popen(
        **in_folder(tmp_path, program, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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
    """Runs Python with these arguments, without a reader of its output. Returns the status and stderr."""
    reads, writes = os.pipe()
    os.close(reads)
    command, buffered = [sys.executable, "-W", "error", *arguments], os.environ | {"PYTHONUNBUFFERED": ""}
    try:
        run = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writes, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writes)
    return run.returncode, run.stderr


@pytest.mark.slow
def test_output_without_a_reader():
    """The output is written when the program ends, or before."""
    for main in ("lambda: print(1)", "lambda: print(1, flush=True)", "lambda: sys.exit(print(1))"):
        # It is run by its path, because importing it would import JAX, which takes a second.
        script = f"import runpy, sys; runpy.run_path({command_line.__file__!r})['run']({main})"
        assert without_a_reader("-c", script) == (141, ""), main


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.slow
def test_help_without_a_reader(program):
    module_of(program)
    assert without_a_reader("-m", program, "--help") == (141, "")
