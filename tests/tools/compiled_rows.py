"""Losses of logits compiled for devices that aren't there, for test_row_programs.py: prints the programs' texts."""

from __future__ import annotations

from bench import children, compilers
from bench.accelerators import MODES
from bench.engines import HVP
from bench.peers import JAX, TASKS

FUNCTIONS = [
    "cross_entropy_with_integer_labels",
    "cross_entropy_with_integer_labels, smoothed",
    "cross_entropy_with_integer_labels, z-loss",
    "cross_entropy_with_logits",
    "entropy_with_logits",
    "kl_divergence_with_logits",
    "kl_divergence",
    "jensen_shannon_divergence",
]


def main() -> None:
    device, rows, classes = children.todo()
    for task in TASKS:
        if task.label in FUNCTIONS:
            shapes = task.shapes(rows, classes, 1)
            for mode in MODES:
                arguments = shapes + ([shapes[i] for i in task.trained] if mode == HVP else [])
                program = compilers.compiled(JAX.program(task.functions["jce"], mode, task.trained), device, arguments)
                children.tell((task.label, mode), program.as_text())


if __name__ == "__main__":
    main()
