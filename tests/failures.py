"""What is said of a test that fails: its case, and the command that repeats it."""

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
LONGEST = 160  # characters that are shown of a variable


def case(failure: Any) -> str:
    """The variables of the test where it failed, a line each: numbers, names, options; of an array its dtype and shape.

    A law that loops over functions, modes or arguments so says which of them it failed for.
    """
    frames = [entry.frame.raw for entry in failure.traceback if FOLDER in pathlib.Path(entry.path).parents]
    found = {name: x for frame in frames for name, x in frame.f_locals.items() if not name.startswith(("_", "@"))}
    lines = {name: shown(x) for name, x in found.items()}
    # A function that the test itself defines has the variable's name.
    return "\n".join(
        f"{name} = {text}" for name, text in lines.items() if text not in ("", name) and len(text) <= LONGEST
    )


def shown(x: Any) -> str:
    """The variable in short, or nothing if it doesn't help to tell cases apart."""
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
    """The command that runs the test alone, under the same settings of JAX."""
    settings = [f"{name}={shlex.quote(x)}" for name, x in sorted(os.environ.items()) if name.startswith("JAX_")]
    options = [f"--as-on {item.config.option.as_on}"] if item.config.option.as_on else []
    if item.get_closest_marker("hypothesis"):
        profile, seed = hypothesis.settings.get_current_profile_name(), item.config.option.hypothesis_seed
        options += [f"--hypothesis-profile={profile}", f"--hypothesis-seed={seed}"]
    return " ".join([*settings, "python -m pytest -n0 -m ''", *options, shlex.quote(item.nodeid)])
