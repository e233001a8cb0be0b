"""Processes of their own, for what must be set before JAX is imported: each prints a JSON pair of label and lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator


def lines(module: str, todo: object, environment: dict[str, str], quiet: bool = False) -> Iterator[tuple[str, list]]:
    """What the module prints of what there is to do; where it is quiet, its errors show only if it fails."""
    command = [sys.executable, "-m", module, json.dumps(todo)]
    # In a session of its own, where Ctrl-C doesn't reach it, the child ends with its standard input, so with this.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors if quiet else None,
            text=True,
            start_new_session=True,
        ) as child,
    ):
        for text in child.stdout:
            yield tuple(json.loads(text))
        if child.wait():
            errors.seek(0)
            sys.stderr.write(errors.read())
            raise subprocess.CalledProcessError(child.returncode, command)


def todo() -> object:
    """In the child: what there is to do. It ends with the parent from here on."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    return json.loads(sys.argv[1])


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def tell(label: str, lines: list) -> None:
    print(json.dumps((label, lines)), flush=True)
