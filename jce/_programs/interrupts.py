"""Ctrl-C ends a program at once, with one line, from the import of its package on, before its own first line runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading


def end_if_program_of(package: str) -> None:
    """At the top of a package: `end_when_interrupted`, if Python imports it to run a module of it by `-m`.

    sys.argv[0] is "-m" then, and in sys.orig_argv the module's name comes right before the program's own arguments.
    """
    if sys.argv[:1] == ["-m"]:
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        if module.split(".")[0] == package:
            end_when_interrupted()


def end_when_interrupted() -> None:
    """From now on Ctrl-C ends the process at once, with one line and status 130, whatever it is doing.

    Python raises KeyboardInterrupt only once its main thread runs Python code again, which a compiled loop may delay
    for minutes; raised in a callback, it prints a traceback, and the program goes on. So a thread waits for the signal.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in a shell's background
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

    # The thread keeps `woken` alive, of which set_wakeup_fd knows only the file descriptor.
    threading.Thread(target=lambda _: wait(), args=(woken,), daemon=True).start()


end_if_program_of("jce")
