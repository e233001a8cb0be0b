"""Computes the logits of a chunk of tokens, and a function of these logits.

A masked token or a padding token must not contribute to any derivative, whatever its arrays hold and whatever the
function is. Its cotangent is 0, but 0 · ∞ is NaN. So its arguments are replaced by those of a kept token (one that is
not masked), or by numbers at which the function is known to be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jce._heads.inputs import Inputs, dtypes_of, expanded, in_dtypes
from jce._heads.loss.function_head import FunctionHead
from jce._heads.loss.logits import Logits, capped
from jce._heads.loss.products import Products
from jce._jax.arguments import brief, is_real
from jce._jax.platforms import Platform


class ChunkFunction(NamedTuple):
    """function(logits, others, shared, closed over) for the tokens of a chunk. It returns a list of arrays, the leaves
    of a pytree, whose first axis is that of the tokens.

    `logits` has an array, or `Logits`, for each head. `others` has the other arguments of the tokens.
    """

    function: Callable[[list, list[Array], Any, Any], list[Array]]
    one: Any  # the pytree of results, with the shapes and dtypes for one token
    closed_over: Any = ()  # the arrays that the function closes over, a pytree
    has_aux: bool = False  # whether only the first result, a number per token, is differentiated
    multiplied: bool = True  # False: the function takes `Logits`, for which the matmul is still to be done
    halved: bool = False  # whether it stores at most one bfloat16 number per logit if states and head are bfloat16
    filler: tuple[float, ...] | None = None  # `others` for padding: there it is finite at a hidden state of 0
    refused: str = ""  # names of its effects that a derivative must not repeat

    @property
    def trained(self) -> int | None:
        """The index of the differentiated result, if there is just one and it is a number per token. Otherwise None."""
        ones = jax.tree.leaves(self.one)
        inexact = [i for i, x in enumerate(ones) if jnp.issubdtype(x.dtype, jnp.inexact)]
        trained = [0] if self.has_aux else inexact
        return trained[0] if len(trained) == 1 and ones[trained[0]].shape == () else None

    @property
    def is_double(self) -> bool:
        """Whether a result is float64."""
        return jnp.float64 in [x.dtype for x in jax.tree.leaves(self.one)]

    def require_real(self, name: str) -> None:
        """Raises an error if a result isn't real, and so can't be summed or weighted."""
        odd = [x for x in jax.tree.leaves(self.one) if not is_real(x)]
        if odd:
            raise TypeError(
                f"{name}: results that are summed or weighted must be real (floating-point, integer or bool); function"
                f" returns {', '.join(map(brief, odd))} for a token. Convert the results to real numbers, or use"
                f' reduction="none" without weights.'
            )

    def require_zeros(self, name: str) -> None:
        """Raises an error if a result can't be 0, which it has to be for a masked token."""
        if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in jax.tree.leaves(self.one)):
            raise TypeError(
                f"{name}: with `where`, weights or batch_invariant, function must not return random keys, since the"
                f" result of a masked token is 0, and no key is 0. Return jax.random.key_data(key)."
            )

    def of_inputs(self, dtypes: Any, products: Products) -> Callable:
        """The function(platform, inputs of a chunk). `dtypes` are those of the shared arrays before they were made
        `wide`. The results of masked tokens are 0; with a filler, they are 0 only after the loop has joined the
        chunks."""
        # JAX's caches keep this function, so it must not refer to `self`, whose other fields may hold tracers.
        function, multiplied, filler = self.function, self.multiplied, self.filler
        dtypes_closed_over = dtypes_of(self.closed_over)

        def of_chunk(platform: Platform, inputs: Inputs) -> list[Array]:
            hidden, others, _, kept, heads, shared = inputs

            def or_first(arrays, first):
                return [jnp.where(expanded(kept, x), x, f[None]) for x, f in zip(arrays, first, strict=True)]

            if filler is None:
                hidden, others = map(or_first, (hidden, others), shared.first)
            else:  # padding holds zeros already, so only other fillers have to be written
                pairs = zip(others, filler[: len(others)], strict=True)
                others = [jnp.where(expanded(kept, x), x, jnp.full_like(x, f)) if f else x for x, f in pairs]
            logits = []
            for h, head, cap in zip(hidden, heads, shared.caps, strict=True):
                if isinstance(head, FunctionHead):
                    logits.append(capped(head.logits_of(h), cap))
                else:
                    x = Logits(h, head, cap, products.on(platform, h, head.weight))
                    logits.append(x.whole() if multiplied else x)
            of_all = in_dtypes(shared.given, dtypes), in_dtypes(shared.closed_over, dtypes_closed_over)
            results = function(logits, others, *of_all)
            if filler is not None:
                return results
            return [jnp.where(expanded(kept, r), r, jnp.zeros_like(r)) for r in results]

        return of_chunk
