"""Several processes with a sharded head, on loopback: results equal those of one process, and no process hangs."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

WORKER = pathlib.Path(__file__).with_name("worker.py")


@contextlib.contextmanager
def workers(count, *extra):
    """The processes, which don't outlive the test."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), coordinator, str(count), str(i), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def results(count):
    with workers(count) as running:
        out = [process.communicate(timeout=120) for process in running]
        assert [process.returncode for process in running] == [0] * count, [err[-2000:] for _, err in out]
    return [json.loads(text.splitlines()[-1]) for text, _ in out]


@pytest.mark.slow
def test_two_processes_equal_one():
    """Two processes with two devices each have the losses and the head of one process with four, to a few ulps."""
    (one,), (first, second) = results(1), results(2)
    assert one[0] > one[-2] > 0
    assert first == second
    np.testing.assert_allclose(first, one, rtol=2e-6)


@pytest.mark.slow
def test_if_a_process_is_killed_the_other_ends_with_an_error():
    with workers(2, "stall") as (survivor, victim):
        assert "stalled\n" in iter(victim.stdout.readline, "")  # after what gloo says of itself
        victim.kill()
        start = time.monotonic()
        _, err = survivor.communicate(timeout=100)
        assert survivor.returncode != 0
        assert time.monotonic() - start < 90
        assert err
