"""The text that is printed below a failed test: its case, and the command that repeats it."""

from __future__ import annotations

import os
import pathlib
import shlex
from typing import Any

import hypothesis
import jax
import numpy as np

from tests.kernels import Kernel, label

FOLDER = pathlib.Path(__file__).parent
LONGEST = 160  # a variable with more characters is not shown


def case(failure: Any) -> str:
    """The test's variables where it failed, one per line: numbers, names, options, and the dtype and shape of arrays.

    So if a law loops over functions, modes or arguments, you can see which of them failed.
    """
    frames = [entry.frame.raw for entry in failure.traceback if FOLDER in pathlib.Path(entry.path).parents]
    found = {name: x for frame in frames for name, x in frame.f_locals.items() if not name.startswith(("_", "@"))}
    lines = {name: shown(x) for name, x in found.items()}
    # A function that the test itself defines is left out: it would be shown as the variable's own name.
    return "\n".join(
        f"{name} = {text}" for name, text in lines.items() if text not in ("", name) and len(text) <= LONGEST
    )


def shown(x: Any) -> str:
    """The variable as a short text, or "" if the variable doesn't help to tell cases apart."""
    if isinstance(x, Kernel):
        return label(x)
    if isinstance(x, str | bool | int | float | np.generic | np.dtype | None):
        return repr(x)
    if isinstance(x, type):
        return x.__name__
    if isinstance(x, np.ndarray | jax.Array):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]" if x.shape else str(x)
    if callable(x):
        name = getattr(x, "__name__", "")
        return "" if name == "<lambda>" else name
    if isinstance(x, dict):
        parts = {key: shown(value) for key, value in x.items()}
        return f"{{{', '.join(f'{key!r}: {text}' for key, text in parts.items())}}}"
    if isinstance(x, tuple | list):
        return f"({', '.join(map(shown, x))})"
    return ""


def command(item: Any) -> str:
    """The command that runs this test alone, with the same settings of JAX."""
    settings = [f"{name}={shlex.quote(x)}" for name, x in sorted(os.environ.items()) if name.startswith("JAX_")]
    options = [f"--as-on {item.config.option.as_on}"] if item.config.option.as_on else []
    if item.get_closest_marker("hypothesis"):
        profile, seed = hypothesis.settings.get_current_profile_name(), item.config.option.hypothesis_seed
        options += [f"--hypothesis-profile={profile}", f"--hypothesis-seed={seed}"]
    return " ".join([*settings, "python -m pytest -n0 -m ''", *options, shlex.quote(item.nodeid)])
