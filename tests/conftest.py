"""Strict mode for every test: eight host devices, no silent promotion of dtypes or ranks."""

import collections
import contextlib
import gc
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest

from jce._jax import platforms as _platforms
from tests import failures

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects and keeps few: this saves a tenth of the time
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# For tests/test_fuzz.py: each example is a batch, and some examples compile a program.
for profile, examples in (("short", 12), ("long", 500)):
    hypothesis.settings.register_profile(profile, max_examples=examples, deadline=None, database=None)
hypothesis.settings.load_profile("short")


# For each mark, the setting of JAX under which tests with the mark can't pass
UNLESS = {"holds_nan": "jax_debug_nans", "needs_jit": "jax_disable_jit"}


def pytest_addoption(parser):
    parser.addoption("--optimized", action="store_true", help="compile everything as users do, in twice the time")
    parser.addoption("--as-on", choices=["TPU", "GPU"], help="lower programs on this CPU as for this platform")
    parser.addoption("--part", metavar="K/N", help="run every N-th selected test, from the K-th on (counted from 0)")


def pytest_configure(config):
    if not config.option.optimized:
        compile_cheaply()
    if config.option.as_on:
        _platforms.CPU = getattr(_platforms, config.option.as_on)


def compile_cheaply():
    """Compile to slow code in a third of the time. Tests that need the code that users get call `optimized_jit`."""
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    cases = collections.defaultdict(lambda: collections.defaultdict(list))
    for item in items:
        if mark := item.get_closest_marker("one_for_each"):
            cases[item.function][id(item.callspec.params[mark.args[0]])].append(item)
    for of_function in cases.values():
        for place, some in enumerate(of_function.values()):
            for k, item in enumerate(some):
                if k != place % len(some):
                    item.add_marker("slow")
    of_laws = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("in_turn"):
            every, others = (*mark.args, "slow")[:2]
            if others == "slow" or not item.get_closest_marker("slow"):
                of_laws[item.function, every, others].append(item)
    for (function, every, others), some in of_laws.items():
        every = min(every, len(some))
        first = sum(map(ord, function.__name__)) % every  # each test function begins with a different case
        for k, item in enumerate(some):
            if (k + k // every) % every != first:  # shifts by one each time, to vary the inner parameter
                item.add_marker(others)
    for mark, setting in UNLESS.items():
        if getattr(jax.config, setting):
            for item in filter(lambda item, mark=mark: item.get_closest_marker(mark), items):
                item.add_marker(pytest.mark.skip(reason=f"{mark}, under {setting}"))
    yield  # pytest deselects the slow tests
    if config.option.part:
        part, of = map(int, config.option.part.split("/"))
        items[:] = [item for k, item in enumerate(items) if (k + k // of) % of == part % of]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Print the case of a failure, and the command that repeats it, below the error."""
    report = yield
    if report.failed and call.excinfo:
        report.sections += [("Case", failures.case(call.excinfo)), ("To repeat it", failures.command(item))]
    return report


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(
        f"hypothesis: profile {hypothesis.settings.get_current_profile_name()}, seed {config.option.hypothesis_seed}"
    )


@pytest.fixture(autouse=True)
def debug_nans_in_this_thread():
    """Set jax_debug_nans for the thread too.

    Once a custom_jvp function has been differentiated, the process's setting no longer affects compiled calls.
    """
    with jax.debug_nans(True) if jax.config.jax_debug_nans else contextlib.nullcontext():
        yield


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
    """This CPU, which lowers programs as a CPU or as an accelerator does."""
    if request.param == "accelerator":
        monkeypatch.setattr(_platforms, "CPU", _platforms.TPU)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(2026)


@pytest.fixture
def float32_by_default():
    """For tests that print results or make arrays from Python numbers."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def optax_promotes():
    """For optax, which adds Python scalars and arrays of different dtypes (in Adam, and in the line search)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
