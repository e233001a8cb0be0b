"""Plants faults in jce's kernels, one at a time, and counts those that the quick tests catch.

Run it by `python -m tests.mutation`. A fault is a changed sign, comparison or constant, or a dropped term, guard or
decorator. The same number of faults of each kind is sampled. Each fault is planted in a copy of the project, in a
temporary folder. Needs `pip install -e '.[mutation]'`.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import parso.python.tree
import parso.tree  # before cosmic_ray, whose imports need it
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from rich.progress import track

ROOT = pathlib.Path(__file__).parents[1]
NOT_KERNELS = {"__init__", "command_line", "interrupts", "demo"}
# The tests in these files that SECONDS selects take seconds once their programs are compiled. They run first.
FAST_TESTS = ["accuracy", "identities", "corners", "logits", "linear", "numerics", "arguments", "check_distribution"]
FAST_TESTS += ["fuzz", "cost", "linear_cost", "linear_map", "sparse_targets", "jensen_shannon", "long_rows"]
FAST_TESTS += ["devices", "platforms"]
SECONDS = (
    "not (float64 and (accuracy or corners)) and not hundred_thousand and not third and not second_derivatives"
    " and not nestings and not test_axis and not linear_cost and not long_rows and not devices and not platforms"
)
OTHER_TESTS = [name for path in sorted(ROOT.glob("tests/test_*.py")) if (name := path.stem.removeprefix("test_"))]
OTHER_TESTS = [name for name in OTHER_TESTS if name not in [*FAST_TESTS, "package"]]
HEAD_TESTS = ["linear", "linear_map", "sparse_targets", "platforms", "linear_cost", "on_mesh", "tokens", "devices"]
SLOWER = [(FAST_TESTS, f"not ({SECONDS})"), (OTHER_TESTS, "test")]  # the rest of the quick tests
LIMIT = 600  # seconds, after which a fault that makes a test run forever counts as caught

# Parts of mutated lines that change nothing that a test could catch, and the reasons. Such mutants aren't run.
EQUIVALENT = {
    "x[ -1].ndim": "both arrays have the same rank",
    "more * 2.0 ** -(k // 3)": "a quotient near 2^-105 is within the range of floats, whether it is scaled or not",
    "self.sum(exp( (-self.column(m))))": "`unshared` may be called with any number that is not negative",
    "jnp.maximum(classes.column(classes.sum(kept)), 2)": "a single class has the loss 0, whatever its probability",
    "itemsize >= 5": "an int32 doesn't change, and a uint32 that wraps is outside the range of labels",
    "no @abstractmethod": "every backend that is used has these methods",
    "no @kernel": "rows are then summed as on a CPU on every platform, which affects only speed",
    "strict=False)": "every zip with strict=True gets equally long sequences, whatever the arguments of a call",
    "SHORTEST_BLOCK + 2": "the length of blocks affects only speed",
    "_excess.defjvp(_excess_rule, symbolic_zeros=False)": "the terms that it adds are 0, which affects only speed",
    "unless_negative( ((q)), deviance(p, q": "the logarithm of a negative p is NaN already",
    "unless_negative( ((q)), terms)": "the logarithm of a negative p is NaN already",
    "if (smoothing is not None):": "a caller that passes a smoothing passes a mean too",
    "backend.unfold(r) if r.ndim > x.ndim": "a result with as many axes as unfolded rows is not folded",
    "/ jnp.ones_like(": "division by 1 equals multiplication by 1",
    "x[ 1].ndim + axis": "both floats of a pair have the same rank",
    "/,": "callers pass the arguments before it by position and those after it by name",
    "jnp.where(b <= 0.5, log_odds, 0 - log_odds)": "the log-odds at 1/2 are 0",
    "Sums(m, s - (m - m), t)": "m - m is 0 or NaN",
    "[ (tuple(name for name in mesh_names(axes) if name in types)) for": "an empty tuple is the same as None",
    "return self.count_here(x) <= LONG_ROW": "how a row of this length is summed affects only speed",
    "((softmax(x, backend)) * (centered": "both factors are finite, for any finite direction",
    "_excess_of_logits.defjvp(_excess_of_logits_rule, symbolic_zeros=False)": "the terms that it adds are 0, which"
    " affects only speed",
    "broadcast_to(d_head.bias, e.shape)).sum(1)": "the array has two axes",
    "classes)) - ((relative) * (c_))": "where this product is NaN, the derivative doesn't exist",
    "classes)) - ((relative) * (b_))": "where this product is NaN, the derivative doesn't exist",
    "bit_length() + 11)": "a sum would overflow only if all n classes had the largest weight",
    "((terms) * (d_log_p))": "where |log q/p| < 3/2, both factors are finite, for any finite direction",
    "self._normalizer(m, exponential(x, 0, self), z))": "whether XLA may share an exponential affects only speed",
    "self.sum(exponential(x, 1, self))": "whether XLA may share an exponential affects only speed",
    "r if r.ndim != ndim else lax.optimization_barrier(r)": "which results have a barrier affects only speed, on a GPU",
    "head.weight.shape[0] > head.weight.shape[1]": "the place where a token's weight is multiplied affects only speed",
}


def code(node) -> str:
    return node.get_code().strip()


class DropOperand(Operator):
    """Drops a term, a factor or a condition: a + b becomes a or b."""

    TYPES = ("arith_expr", "term", "expr", "and_expr", "and_test", "or_test")

    def without_one(self, node) -> Iterator[str]:
        if node.type not in self.TYPES:
            return
        operands = [code(child) for child in node.children]
        for k in range(0, len(operands), 2):
            rest = operands[: k - 1] + operands[k + 1 :] if k else operands[2:]
            if k or operands[1] not in ("-", "/", "//", "%", "@"):
                yield " ".join(rest)
            elif operands[1] == "-":
                yield "-" + " ".join(rest)

    def mutation_positions(self, node):
        return [(node.start_pos, node.end_pos) for _ in self.without_one(node)]

    def mutate(self, node, index):
        return parso.parse(f" ({list(self.without_one(node))[index]})")

    @classmethod
    def examples(cls):
        return ()


class DropGuard(DropOperand):
    """Replaces jnp.where, a maximum or a minimum by one of its arguments, and mul0 by a plain product."""

    CALLS = types.MappingProxyType(
        {"jnp.where": (1, 2), "jnp.maximum": (0, 1), "jnp.minimum": (0, 1), "jnp.abs": (0,), "negative": (0,)}
    )

    def without_one(self, node):
        if node.type not in ("atom_expr", "power"):
            return
        call = next((k for k, child in enumerate(node.children) if child.get_code().startswith("(")), None)
        if call is None or len(node.children[call].children) != 3:
            return
        name, after = "".join(map(code, node.children[:call])), "".join(map(code, node.children[call + 1 :]))
        inside = node.children[call].children[1]
        arguments = [code(x) for x in inside.children[::2]] if inside.type == "arglist" else [code(inside)]
        for k in self.CALLS.get(name, ()):
            if k < len(arguments):  # there may be one argument, an unpacked list
                yield f"({arguments[k]}){after}"
        if name in ("mul0", "mul00"):
            yield f"({arguments[0]}) * ({arguments[1]})"
        elif name == "ratio":
            yield f"({arguments[0]}) / ({arguments[1]})"


def binary(*pairs: str) -> list[str]:
    return [f"ReplaceBinaryOperator_{pair}" for pair in pairs]


def comparisons() -> list[str]:
    orders, equalities = ("Lt", "LtE", "Gt", "GtE"), ("Eq", "NotEq", "Is", "IsNot")
    swaps = [(a, b) for a in orders for b in orders if a != b] + [
        (equalities[k], equalities[k ^ 1]) for k in range(len(equalities))
    ]
    return [f"ReplaceComparisonOperator_{a}_{b}" for a, b in swaps]


def built_in(*names: str) -> list[Operator]:
    return [get_operator(f"core/{name}")() for name in names]


KINDS: dict[str, list[Operator]] = {
    "sign": built_in(*binary("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul"), "ReplaceUnaryOperator_Delete_USub"),
    "comparison": built_in(
        *comparisons(), *binary("BitOr_BitAnd", "BitAnd_BitOr"), "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot",
        "ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not",
    ),
    "constant or axis": built_in("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    "term": [DropOperand()],
    "guard": [DropGuard()],
    "decorator": built_in("RemoveDecorator"),
}  # fmt: skip


class Mutant(NamedTuple):
    module: str
    line: int
    before: str
    after: str
    source: str


def why_none(mutant: Mutant) -> str | None:
    line = mutant.after or f"no {mutant.before}"
    return next((reason for mark, reason in EQUIVALENT.items() if mark in line), None)


def meaning(source: str) -> str:
    """The program's syntax tree without annotations, which are never evaluated."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def places() -> dict[str, list[tuple[str, str, Operator, int, int]]]:
    """The places for faults, by kind of fault: the module, its source, the operator, and its k-th position and line."""
    found = {kind: [] for kind in KINDS}
    for path in sorted((ROOT / "jce").rglob("*.py")):
        if path.stem in NOT_KERNELS:
            continue
        module = path.relative_to(ROOT / "jce").with_suffix("").as_posix()
        source = path.read_text()
        nodes = list(ast_nodes(get_ast(source)))
        for kind, operators in KINDS.items():
            for operator in operators:
                positions = [position for node in nodes for position in operator.mutation_positions(node)]
                found[kind] += [(module, source, operator, k, line) for k, ((line, _), _) in enumerate(positions)]
    return found


def planted(module: str, source: str, operator: Operator, k: int, line: int) -> Mutant | None:
    """The module with this fault, or None if its meaning is the same or its syntax is invalid."""
    mutated = mutate_code(source, operator, k)
    try:
        if meaning(mutated) == meaning(source):
            return None
    except SyntaxError:
        return None
    before, after = source.splitlines(), mutated.splitlines()
    now = after[line - 1] if len(before) == len(after) else ""
    return Mutant(module, line, before[line - 1].strip(), now.strip(), mutated)


def sample(count: int, seed: int) -> list[tuple[str, Mutant]]:
    """A random sample with the same number of faults of each kind, or all of a kind if there are fewer."""
    chance = random.Random(seed)
    left = {kind: chance.sample(found, len(found)) for kind, found in places().items()}
    chosen, programs = [], set()
    while len(chosen) < count and any(left.values()):
        for kind, found in left.items():
            while found:
                mutant = planted(*found.pop())
                if mutant and mutant.source not in programs:
                    programs.add(mutant.source)
                    chosen.append((kind, mutant))
                    break
    return chosen[:count]


class Copies:
    """Copies of the project, in which mutants are tested. They share a compilation cache."""

    def __init__(self, folder: str, jobs: int):
        self.folder = pathlib.Path(folder)
        self.free: queue.Queue[pathlib.Path] = queue.Queue()
        ignored = shutil.ignore_patterns("__pycache__")
        for k in range(jobs):
            copy = self.folder / f"copy{k}"
            for part in ("jce", "tests", "bench"):
                shutil.copytree(ROOT / part, copy / part, ignore=ignored)
            for name in ("pyproject.toml", "README.md"):
                shutil.copy(ROOT / name, copy / name)
            self.free.put(copy)

    @contextlib.contextmanager
    def with_fault(self, module: str, source: str) -> Iterator[pathlib.Path]:
        copy = self.free.get()
        path = copy / "jce" / f"{module}.py"
        original = path.read_text()
        path.write_text(source)
        try:
            yield copy
        finally:
            path.write_text(original)
            self.free.put(copy)

    def passes(self, copy: pathlib.Path, tests: list[str], chosen: str, processes: int = 0) -> bool:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            **os.environ,
        }
        files = [f"tests/test_{name}.py" for name in tests]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            f"-n{processes}",
            "-p",
            "no:cacheprovider",
            "-k",
            chosen,
            *files,
        ]
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def survives(copies: Copies, mutant: Mutant) -> bool:
    """Whether all quick tests pass in spite of the fault. The tests that are most likely to fail run first.

    They are the tests of heads if the module is in `_heads`. Otherwise they are the tests of the functions that the
    module defines, or the test file that is named after the module.
    """
    if mutant.module.startswith("_heads/"):
        first = [(sorted(HEAD_TESTS, key=lambda test: test not in f"linear {mutant.module}"), "test")]
        stages = [*first, (FAST_TESTS, SECONDS), *SLOWER]
    else:
        source = (ROOT / "jce" / f"{mutant.module}.py").read_text()
        own = " or ".join(re.findall(r"^@public\(.*\ndef (\w+)", source, re.MULTILINE))
        files = sorted(FAST_TESTS, key=lambda test: test not in mutant.module)
        first = [f"{SECONDS} and ({own})", f"{SECONDS} and not ({own})"] if own else [SECONDS]
        stages = [*((files, chosen) for chosen in first), *SLOWER]
    with copies.with_fault(mutant.module, mutant.source) as copy:
        return all(copies.passes(copy, *stage) for stage in stages)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.mutation", description=__doc__)
    parser.add_argument("--sample", type=int, default=210, help="number of faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults tested at once (default: %(default)s)")
    options = parser.parse_args()
    start, chosen = time.monotonic(), sample(options.sample, options.seed)
    drawn, caught, none = collections.Counter(), collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = Copies(folder, options.jobs)
        with copies.with_fault("__init__", (ROOT / "jce" / "__init__.py").read_text()) as copy:
            if not all(copies.passes(copy, *stage, options.jobs) for stage in [(FAST_TESTS, SECONDS), *SLOWER]):
                raise SystemExit("the tests fail without a fault")
        print(f"the tests take {time.monotonic() - start:.0f} s without a fault", flush=True)
        results = pool.map(lambda drawn: why_none(drawn[1]) or survives(copies, drawn[1]), chosen)
        for (kind, mutant), survived in track(zip(chosen, results, strict=True), "faults", len(chosen)):
            drawn[kind] += 1
            if not survived:
                caught[kind] += 1
                print(f"{kind}: jce/{mutant.module}.py:{mutant.line} caught", flush=True)
                continue
            reason = why_none(mutant)
            none[kind] += reason is not None
            print(f"{kind}: jce/{mutant.module}.py:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}")
            print(f"  {reason or 'SURVIVES'}", flush=True)
    for kind, number in drawn.items():
        print(f"{kind:17} {caught[kind]:3} caught of {number:3}, {none[kind]} excluded as equivalent")
    faults = drawn.total() - none.total()
    print(
        f"seed {options.seed}: {caught.total()} of {faults} faults caught, {caught.total() / faults:.1%},"
        f" and {none.total()} mutants excluded as equivalent, in {(time.monotonic() - start) / 60:.0f} min"
    )


if __name__ == "__main__":
    main()
