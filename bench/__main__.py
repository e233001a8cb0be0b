"""Benchmarks of jce and of other libraries: `python -m bench`."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hides XLA's warnings about constants that take a second to fold

from jce._programs.command_line import Parser, run

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "python -m bench"
VERIFY = "verify"
BENCHES = ("accuracy", "search", "speed", "first-call", "memory", "scale", "accelerators", VERIFY)
RESULTS = pathlib.Path(__file__).parent / "results"


# `verify` has its own extra, which lacks the packages of the other benchmarks. So modules that run benchmarks or report
# results are imported only when the command line is known.


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.{name.replace('-', '_')}")


def import_all(benches: Sequence[str]) -> None:
    """Imports the modules of these benchmarks. If a package isn't installed, exits and says which extra to install."""
    only_verify = set(benches) == {VERIFY}
    try:
        for name in ["tables", *benches, *([] if only_verify else ["pictures"])]:
            module(name)
    except ModuleNotFoundError as error:
        extra = VERIFY if only_verify else "bench"
        print(f"{PROGRAM} needs {error.name}, which isn't installed: pip install -e '.[{extra}]'", file=sys.stderr)
        raise SystemExit(2) from None


def measured(name: str, quick: bool, only: str, path: pathlib.Path, options: dict) -> list[dict]:
    """Runs one benchmark with a progress bar, and replaces the lines of the file by the new ones.

    If it is interrupted, or measures only some functions or rows, the file keeps its other lines.
    """
    from bench import results

    around = results.environment({"quick": quick, "only": only} | options)
    if name == "search":
        options = options | {"known": (str(path),)}
    kept, lines = results.read(path) if path.exists() else [], []
    for found in with_progress(name, module(name).run(quick, only, **options)):
        lines += [results.complete(line, name, around) for line in found]
        results.write(results.merged(kept, lines), path)  # after each case, because an interrupt ends the process
    if not only and not options.get("long_rows"):
        results.write(results.merged([], lines), path)
    return lines


def with_progress(name: str, cases: Iterator[tuple[str, list[dict]]]) -> Iterator[list[dict]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(f"{name} {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=int(next(cases)[0]))
        for label, found in cases:
            yield found
            progress.update(bar, advance=1, description=label)


def report(name: str, lines: list[dict], path: pathlib.Path, old: list[dict], console: Console) -> None:
    from bench import results, tables

    for table in tables.TABLES[name](lines):
        console.print(table)
    if name != VERIFY and name in module("pictures").PICTURES:
        module("pictures").PICTURES[name](results.read(path), path.with_suffix(".png"))
    if old:
        same = [line for line in old if line["bench"] == name]
        console.print(tables.moved(list(results.moved(same, lines))))


def file_of(name: str, quick: bool) -> str:
    import jax

    on = {"accelerators": lambda: "compiled", VERIFY: lambda: module(VERIFY).file_name()}
    return f"{name}-{on.get(name, jax.default_backend)()}{'-quick' if quick else ''}.jsonl"


def cannot(benches: Sequence[str]) -> Iterator[str]:
    """Says which packages are missing, and what is therefore not measured."""
    if set(benches) != {VERIFY} and (skipped := module("peers").missing()):
        yield f"skipped, since not installed: {', '.join(skipped)} (pip install -e '.[bench]')"
    if "accelerators" in benches and (packages := module("accelerators").missing()):
        yield f"accelerators needs {', '.join(packages)}: pip install -e '.[bench,accelerators]'"


def options_of_search(args: argparse.Namespace) -> dict:
    seconds = module("search").SECONDS if args.seconds is None else args.seconds
    return {"seconds": seconds, "seed": args.seed, "long_rows": args.long_rows}


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    for line in cannot(args.benches):
        console.print(line, markup=False)
    for name in args.benches:
        if name == "accelerators" and module(name).missing():
            continue
        path = args.out / file_of(name, args.quick)
        lines = measured(name, args.quick, args.only, path, options_of_search(args) if name == "search" else {})
        if not lines:
            console.print(f"{name}: this benchmark has no function with {args.only!r} in its name\n", markup=False)
            continue
        report(name, lines, path, args.compare, console)
        to_send = f". {module(name).TO_SEND}" if name == VERIFY else ""
        console.print(f"{len(lines)} lines{to_send}: {path}\n")
        module(name).check(lines)


def _results(name: str) -> list[dict]:
    try:
        return module("results").read(pathlib.Path(name))
    except OSError as error:
        raise ValueError(f"can't read {name!r}: {error.strerror}") from None


def _folder(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't make the folder {name!r}: {error.strerror}") from None
    return path


def _function(text: str) -> str:
    labels = list(dict.fromkeys([*(task.label for task in module("peers").TASKS), *module("search").NAMES]))
    if not any(text in label for label in labels):
        raise ValueError(f"must be part of a function's name, not {text!r}: {'; '.join(labels)}")
    return text


def parser() -> Parser:
    made = Parser(
        prog=PROGRAM,
        description="Measure the accuracy, speed and memory of jce and of other libraries; search for jce's largest"
        " errors; verify on this device what jce claims.",
    )
    add = made.add_argument
    add("benches", metavar="BENCH", nargs="*", help=f"Any of {', '.join(BENCHES)} (default: all).")
    add("--quick", action="store_true", help="Measure some functions on small inputs (all benchmarks: four minutes).")
    add("--only", "--of", default="", metavar="NAME", help="Measure only functions with this in their name.")
    add("--out", type=_folder, default=str(RESULTS), metavar="DIR", help="The folder for results and pictures.")
    add(
        "--compare",
        default="",
        metavar="OLD.jsonl",
        help="Print what has changed since these results, beyond the noise.",
    )
    add("--seconds", type=float, metavar="S", help="The time that search takes for each function (default: 30).")
    add("--seed", type=int, default=0, metavar="N", help="The seed of search's random numbers.")
    add("--long-rows", action="store_true", help="Let search try only rows of thousands of classes.")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes results and pictures. Exit status: 2 for wrong input, 130 if interrupted."""
    parsing = parser()
    args = parsing.parse_args(argv)
    if unknown := [name for name in args.benches if name not in BENCHES]:
        parsing.error(f"BENCH must be one of {', '.join(BENCHES)}, not {unknown[0]!r}")
    args.benches = args.benches or list(BENCHES)
    import_all(args.benches)
    try:
        args.only = _function(args.only)
        args.compare = _results(args.compare) if args.compare else []
    except ValueError as error:
        parsing.error(str(error))
    _run(args)
    return 0


if __name__ == "__main__":
    run(main)
