"""Helpers for the programs' command lines: exit status, errors in one line, checks of values, and missing extras."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exits with the status of main. If the reader of its output ends early, like `| head`, exits as after SIGPIPE."""
    try:
        try:
            raise SystemExit(main())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, which would print another traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None  # SIGPIPE is 13


@contextlib.contextmanager
def extra(program: str, module: str, install: str) -> Iterator[None]:
    """Wraps the imports of a program. If a package is missing, the error is one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{program} needs {error.name}, which isn't installed: pip install {install}"
        if module != "__main__":
            raise ModuleNotFoundError(missing, name=error.name) from error
        print(missing, file=sys.stderr)
        raise SystemExit(2) from None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,20}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, not {text!r}")
        return int(text)

    return parse


def text_file(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't read {name!r}: {error.strerror}") from None
    except ValueError:
        text = "\0"
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{name!r} isn't UTF-8 text")
    return text


def png(name: str) -> str:
    folder = os.path.dirname(name)
    if folder and not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"can't write {name!r}: there is no folder {folder!r}")
    if not name.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, not {name!r}")
    is_new = not os.path.exists(name)
    try:
        # Only opening the file shows whether it can be written: root passes all permission bits, even on a read-only
        # disk.
        with open(name, "ab"):
            pass
        if is_new:
            os.remove(name)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't write {name!r}: {error.strerror}") from None
    return name
