"""Reads, writes and compares lines of results. Each is a JSON object, with the environment of the measurement."""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Iterator

import jax

from bench.peers import version

FOLDER = pathlib.Path(__file__).parent / "results"
# The keys that identify a measurement. The other keys hold its result.
IDENTITY = (
    "bench",
    "function",
    "library",
    "dtype",
    "quantity",
    "mode",
    "model",
    "along",
    "arguments",
    "malloc",
    "device",
)
NOISE = 1.1  # two medians within this factor are the same, however close their quartiles
COMPILED = 1.01  # two costs of compiled programs within this factor are the same


def commit() -> str:
    """The commit of the working tree, with a + if there are changes."""
    try:
        describe = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(describe, cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(settings: dict) -> dict:
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "commit": commit(),
        "device": f"CPU, {os.cpu_count()} cores" if on_cpu else device.device_kind,
        **({} if on_cpu else {"driver": driver(device)}),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "settings": settings,
    }


def driver(device: jax.Device) -> str:
    """The version of JAX's runtime for the device, and for an NVIDIA GPU also that of its driver."""
    runtime = " ".join(device.client.platform_version.split())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # nvidia-smi exists only with NVIDIA's driver
        asked = ""
    return ", ".join([runtime, *asked.split()[:1]])


def complete(line: dict, bench: str, around: dict) -> dict:
    """The line, with the environment of the measurement and the library's version."""
    library = line.get("library", "jce").partition(",")[0]  # a comma and a way to use the library may follow
    known = {} if library in ("jax", "floor") else {library: version(library)}
    return {"bench": bench} | line | {"environment": around | known}


def write(lines: Iterable[dict], path: pathlib.Path) -> None:
    def finite(x):
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, list):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read(path: pathlib.Path) -> list[dict]:
    lines = []
    for i, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "bench" not in line:
            raise ValueError(f"{path}, line {i}, isn't a line of results of python -m bench")
        lines.append(line)
    return lines


def identity(line: dict) -> tuple:
    return tuple(json.dumps(line.get(key)) for key in IDENTITY)


def merged(old: Iterable[dict], new: Iterable[dict]) -> list[dict]:
    """The old lines and the new lines. A new line replaces an old one of the same measurement."""
    by_identity = {identity(line): line for line in [*old, *new]}
    return list(by_identity.values())


def figures(line: dict) -> dict[str, tuple[float, float, float]]:
    """The figures to compare, as (low, middle, high). Times are quartiles, divided by the floor's time; bytes, errors
    and costs are single numbers."""
    found = {}
    if line["bench"] == "accuracy":
        found = {f"ulps, {regime}": [max(1.0, worst(x, "max"))] * 3 for regime, x in line["regimes"].items()}
    if line["bench"] == "search":
        found = {"largest ulps": [max([1.0, *(worst(x, "ulps") for x in line["worst"])])] * 3}
    if "over_floor" in line:
        found["time / floor"] = line["over_floor"]
    if "roofline_over_floor" in line:
        names = {"roofline / floor": "roofline_over_floor", "bytes": "bytes", "cycles": "cycles", "kernels": "kernels"}
        found = {name: [line[key]] * 3 for name, key in names.items() if line[key]}
    if line["bench"] == "verify" and "ulps" in line:
        found = {"largest ulps": [max(1.0, worst(line, "ulps"))] * 3}
    if "jaxpr_lines" in line:
        found = {"first call / peer": [line["jce_over_it"]] * 3, "jaxpr lines": [line["jaxpr_lines"]] * 3}
    if line.get("temporaries") is not None:
        found["temporaries"] = [line["temporaries"]] * 3
    return found


def worst(statistics: dict, key: str) -> float:
    """The statistic `key`: a largest error ("max", "beyond" or "ulps"). ∞ if it is stored as null: a result was NaN."""
    value = statistics[key]
    return math.inf if value is None else value


def moved(old: Iterable[dict], new: Iterable[dict]) -> Iterator[tuple[dict, str, float, float]]:
    """Yields figures that are in both and differ by more than the noise: a line, the figure's name, and both figures.

    The ranges between the quartiles must be disjoint, and the medians differ by more than a tenth (1 % for compiled
    programs). Times are compared as multiples of the floor's time, which was measured in turn with them.
    """
    before = {identity(line): figures(line) for line in old}
    for line in new:
        noise = COMPILED if line["bench"] == "accelerators" else NOISE
        past = before.get(identity(line), {})
        for name, (low, middle, high) in figures(line).items():
            if name in past:
                old_low, old_middle, old_high = past[name]
                if (low > old_high or high < old_low) and not within(middle, old_middle, noise):
                    yield line, name, old_middle, middle


def grouped(lines: list[dict], *keys: str) -> dict[tuple, dict[str, dict]]:
    """The lines, grouped by the values of these keys, and then by library."""
    groups: dict[tuple, dict[str, dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line.get(key) for key in keys), {})[line["library"]] = line
    return groups


def best_peer(found: dict[str, dict]) -> str | None:
    """The library other than jce whose program has the shortest roofline."""
    peers = {name: line["roofline"] for name, line in found.items() if name != "jce" and "cannot" not in line}
    return min(peers, key=lambda name: peers[name], default=None)


def within(a: float, b: float, factor: float) -> bool:
    return a == b or (math.isfinite(a) and math.isfinite(b) and a <= factor * b and b <= factor * a)
