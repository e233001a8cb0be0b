"""Ctrl-C ends a program at once, with one line, from the moment its package is imported, before its own first line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading


def end_if_program_of(package: str) -> None:
    """At the top of a package: from now on, if Python looks for one of its modules to run, as by `-m package.module`.

    Then the first argument is "-m", and the module's name the last word before the program's own arguments.
    """
    if sys.argv[:1] == ["-m"]:
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        if module.split(".")[0] == package:
            end_when_interrupted()


def end_when_interrupted() -> None:
    """From now on Ctrl-C ends the process at once, with one line and status 130, whatever it is doing.

    A KeyboardInterrupt waits until the main thread is back in Python, which a compiled loop may keep for minutes, and
    can strike within a callback, which prints a traceback and goes on. A thread of its own does neither.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in the background of a shell
        return
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())

    def wait():
        while signal.SIGINT not in wakes.recv(1):
            pass
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os.write(2, b"\ninterrupted\n" if sys.stderr.isatty() else b"interrupted\n")  # below a progress bar
        os._exit(130)

    # The other end lives as long as the thread that keeps it.
    threading.Thread(target=lambda _: wait(), args=(woken,), daemon=True).start()


end_if_program_of("jce")
