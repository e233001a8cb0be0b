"""jce beside its peers, in numbers: `python -m bench`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's warnings of a constant that takes a second to fold

from jce._programs.command_line import Parser, run

PROGRAM = "python -m bench"

try:
    import jax
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bench import (
        accelerators,
        accuracy,
        first_call,
        memory,
        peers,
        pictures,
        results,
        scale,
        search,
        speed,
        tables,
        verify,
    )
except ModuleNotFoundError as error:
    print(f"{PROGRAM} needs {error.name}, which isn't installed: pip install -e '.[bench]'", file=sys.stderr)
    raise SystemExit(2) from None

BENCHES: dict[str, ModuleType] = {
    "accuracy": accuracy,
    "search": search,
    "speed": speed,
    "first-call": first_call,
    "memory": memory,
    "scale": scale,
    "accelerators": accelerators,
    "verify": verify,
}


def measured(name: str, quick: bool, only: str, path: pathlib.Path, options: dict) -> list[dict]:
    """The lines of one benchmark, with a progress bar while it runs; they take the place of those in the file.

    Where it didn't run to its end, or for some functions, the file's other lines stay.
    """
    around = results.environment({"quick": quick, "only": only} | options)
    if name == "search":
        options = options | {"known": (str(path),)}
    kept, lines, cases = results.read(path) if path.exists() else [], [], BENCHES[name].run(quick, only, **options)
    columns = TextColumn(f"{name} {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=int(next(cases)[0]))
        for label, found in cases:
            lines += [results.complete(line, name, around) for line in found]
            results.write(results.merged(kept, lines), path)  # now, since an interrupt ends the process
            progress.update(bar, advance=1, description=label)
    if not only:
        results.write(results.merged([], lines), path)
    return lines


def report(name: str, lines: list[dict], path: pathlib.Path, old: list[dict], console: Console) -> None:
    for table in tables.TABLES[name](lines):
        console.print(table)
    if name in pictures.PICTURES:
        pictures.PICTURES[name](results.read(path), path.with_suffix(".png"))
    if old:
        same = [line for line in old if line["bench"] == name]
        console.print(tables.moved(list(results.moved(same, lines))))


def _run(args: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    if skipped := peers.missing():
        console.print(f"skipped, since not installed: {', '.join(skipped)} (pip install -e '.[bench]')", markup=False)
    for name in args.benches or BENCHES:
        if name == "accelerators" and (packages := accelerators.missing()):
            console.print(f"{name} needs {', '.join(packages)}: pip install -e '.[bench,accelerators]'", markup=False)
            continue
        on = {"accelerators": "compiled", "verify": verify.file_name()}.get(name, jax.default_backend())
        path = args.out / f"{name}-{on}{'-quick' if args.quick else ''}.jsonl"
        options = {"seconds": args.seconds, "seed": args.seed} if name == "search" else {}
        lines = measured(name, args.quick, args.only, path, options)
        if not lines:
            console.print(f"{name}: nothing that it measures has {args.only!r} in its name\n", markup=False)
            continue
        to_send = f". {verify.TO_SEND}" if name == "verify" else ""
        report(name, lines, path, args.compare, console)
        console.print(f"{len(lines)} lines{to_send}: {path}\n")
        BENCHES[name].check(lines)


def _results(name: str) -> list[dict]:
    try:
        return results.read(pathlib.Path(name))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't read {name!r}: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _folder(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't make the folder {name!r}: {error.strerror}") from None
    return path


def _function(text: str) -> str:
    labels = list(dict.fromkeys([*(task.label for task in peers.TASKS), *search.NAMES]))
    if not any(text in label for label in labels):
        raise argparse.ArgumentTypeError(f"must be part of a function's name, not {text!r}: {'; '.join(labels)}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, writes lines and pictures; the exit status is 2 for wrong input, 130 if interrupted."""
    parser = Parser(
        prog=PROGRAM,
        description="Measure jce beside its peers: accuracy, speed, memory, scale, accelerators; search for errors;"
        " verify what is claimed, on this device.",
    )
    add = parser.add_argument
    add("benches", metavar="BENCH", nargs="*", help=f"Of {', '.join(BENCHES)}; all where none is given.")
    add("--quick", action="store_true", help="Small inputs, some functions: four minutes in all.")
    add("--only", "--of", type=_function, default="", metavar="NAME", help="Functions with this in their name.")
    add("--out", type=_folder, default=str(results.FOLDER), metavar="DIR", help="Where lines and pictures go.")
    add("--compare", type=_results, default=[], metavar="OLD.jsonl", help="Print what moved beyond the noise since.")
    add("--seconds", type=float, default=search.SECONDS, metavar="S", help="How long search tries each function.")
    add("--seed", type=int, default=0, metavar="N", help="Of what search draws.")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.benches if name not in BENCHES]:
        parser.error(f"BENCH must be one of {', '.join(BENCHES)}, not {unknown[0]!r}")
    _run(args)
    return 0


if __name__ == "__main__":
    run(main)
