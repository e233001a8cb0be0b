"""Shapes named after models: how many classes, and how wide the hidden states before the head."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    name: str
    classes: int
    width: int
    rows: int | None = None  # a fixed number of rows

    def tokens(self, numbers: float, multiplications: float | None = None) -> int:
        """The number of tokens that gives so many logits, or a matmul of so many multiplications; at most 65,536."""
        if self.rows:
            return self.rows
        most = numbers / self.classes
        if multiplications:
            most = min(most, multiplications / self.classes / self.width)
        return max(8, min(65_536, int(most) // 8 * 8))


MODELS = [
    Model("digits", 10, 64),
    Model("ResNet-50", 1000, 2048),
    Model("GPT-2", 50_257, 768),
    Model("Llama 3.2 1B", 128_256, 2048),
    Model("Qwen3 0.6B", 151_936, 1024),
]

# Batches that fit into a CPU's caches, for losses without a head
BATCHES = [
    Model(f"{rows:,} rows of {n:,}", n, 64, rows)
    for rows, n in ((128, 1000), (1024, 1000), (128, 10_000), (10_000, 10))
]
