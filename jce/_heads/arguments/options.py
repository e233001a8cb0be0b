"""The options that functions of heads share: how to reduce results, how to make chunks, and the matmul precision."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from jax.typing import ArrayLike

from jce._heads.loss.products import Products
from jce._jax.arguments import choice, integer, require_bool

REDUCTIONS = ("mean", "sum", "none")


class Settings(NamedTuple):
    """Checked options. They are static."""

    reduction: str
    chunk_size: int | None  # the number of tokens per chunk, None for the platform's rule
    filled: bool  # whether each chunk is padded to this size, even if there are fewer tokens
    products: Products

    @property
    def sums(self) -> bool:
        """Whether results are summed over tokens."""
        return self.reduction != "none"


class Options(NamedTuple):
    """The options as the public functions document them."""

    where: ArrayLike | None = None
    weights: ArrayLike | None = None
    reduction: str = "none"
    chunk_size: int | None = None
    precision: Any = None
    axis_name: Hashable | None = None  # or the `Places` that `on_mesh` passes
    batch_invariant: bool = False

    def checked(self, name: str) -> Settings:
        reduction = choice(name, reduction=self.reduction, choices=REDUCTIONS)
        size = _chunk_size(name, self.chunk_size, self.batch_invariant)
        return Settings(reduction, size, self.batch_invariant, Products.checked(name, self.precision))


def _chunk_size(name: str, chunk_size: int | None, batch_invariant: bool) -> int | None:
    require_bool(name, batch_invariant=batch_invariant)
    if batch_invariant and chunk_size is None:
        raise ValueError(
            f"{name}: batch_invariant must come with a chunk_size, to which each chunk is then padded; got"
            f" batch_invariant={batch_invariant!r}, chunk_size={chunk_size!r}. Pass the number of tokens per chunk."
        )
    size = integer(chunk_size)
    if chunk_size is not None and (size is None or size < 1):
        raise ValueError(
            f"{name}: chunk_size must be a static int, the number of tokens in a chunk, at least 1;"
            f" got chunk_size={chunk_size!r}. Omit it for a size that depends on the number of classes."
        )
    return size
