"""Ctrl-C ends a program at once, with one line, even while Python still imports the package of the program."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading


def end_if_program_of(package: str) -> None:
    """Calls `end_when_interrupted` if Python imports the package to run one of its modules with `-m`. Call this at the
    top of a package.

    In this case sys.argv[0] is "-m", and in sys.orig_argv the module's name comes right before the program's own
    arguments.
    """
    if sys.argv[:1] == ["-m"]:
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        if module.split(".")[0] == package:
            end_when_interrupted()


def end_when_interrupted() -> None:
    """From now on, Ctrl-C ends the process at once, with one line and status 130, whatever it is doing.

    Python raises KeyboardInterrupt only when its main thread runs Python code again, and a compiled loop may delay this
    for minutes. If it is raised in a callback, it prints a traceback, and the program goes on. So a thread waits for
    the signal.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in a background job of a shell
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

    # `woken` is an argument of the thread to keep it alive: set_wakeup_fd has only its file descriptor.
    threading.Thread(target=lambda _: wait(), args=(woken,), daemon=True).start()


end_if_program_of("jce")
