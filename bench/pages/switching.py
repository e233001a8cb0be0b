"""Makes tables of the losses in the notebook 0_switch, grouped by the library that the losses come from."""

from __future__ import annotations

import ast
import re

LIBRARIES = {"In optax": r"\boptax\b", "In torch and Liger-Kernel": r"\b(torch|Liger)\b"}
OTHERS = ("Other losses of a head", "Other losses of logits and of probabilities")


def tables(source: str) -> str:
    """A table for each group of losses, with their names, their formulas in plain JAX, and their lines of jce."""
    rows: dict[str, list[str]] = {group: [] for group in (*LIBRARIES, *OTHERS)}
    heads = source.partition("# ## Losses of logits and of probabilities")[0].count("\n")
    for call in _calls(source):
        name, plain, ours, *arrays = call.args
        title = ast.literal_eval(name)
        found = [group for group, pattern in LIBRARIES.items() if re.search(pattern, title)]
        group = (*found, OTHERS[call.lineno > heads])[0]
        rows[group].append(f"| {title} | {_code(plain, arrays, source)} | {_code(ours, arrays, source)} |")
    head = "| loss | plain JAX | jce |\n|---|---|---|"
    return "\n".join("\n".join([f"### {group}", "", head, *lines, ""]) for group, lines in rows.items())


def _calls(source: str) -> list[ast.Call]:
    """The calls `row(name, plain, ours, *arrays)`, in order."""
    values = [node.value for node in ast.parse(source).body if isinstance(node, ast.Expr)]
    return [call for call in values if isinstance(call, ast.Call) and ast.unparse(call.func) == "row"]


def _code(function: ast.expr, arrays: list[ast.expr], source: str) -> str:
    """The code of a function in one line of a table: the body of a lambda, or a call of another function."""
    if isinstance(function, ast.Lambda):
        text = ast.get_source_segment(source, function.body) or ""
        # Removes spaces and commas that came from line breaks
        text = re.sub(r"(?<=\() | (?=\))|,(?= ?\))", "", " ".join(text.split()))
    else:
        text = f"{ast.unparse(function)}({', '.join(map(ast.unparse, arrays))})"
    return f"`{text.replace('|', chr(0x5C) + '|')}`"
