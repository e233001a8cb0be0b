"""Child processes, for settings that JAX reads when it is imported. They print JSON pairs of a label and lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator


def lines(module: str, todo: object, environment: dict[str, str], quiet: bool = False) -> Iterator[tuple[str, list]]:
    """Runs the module in a child with `todo`, and yields its pairs. If quiet, shows stderr only if the child fails."""
    command = [sys.executable, "-m", module, json.dumps(todo)]
    # The child has its own session, so Ctrl-C does not reach it. It ends when its standard input closes, that is, when
    # this process ends.
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
    """Returns the work of the child, which calls this. From then on the child ends when its parent ends."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    return json.loads(sys.argv[1])


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def tell(label: str, lines: list) -> None:
    print(json.dumps((label, lines)), flush=True)
