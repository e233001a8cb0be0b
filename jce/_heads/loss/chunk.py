"""What is computed for a chunk of tokens: their logits, and a function of them.

A token that is left out, or that is padding, may reach no derivative, whatever it holds and whatever the function is.
Its cotangent is 0, but 0 · ∞ is NaN. So its arguments are replaced by those of a token that is kept, or by numbers at
which the function is known to be finite.
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
    """function(logits, others, shared, closed over) of a chunk's tokens. Its results, the leaves of a tree, have the
    tokens as their first axis.

    `logits` has an array, or `Logits`, for each head; `others` the other arguments of the tokens.
    """

    function: Callable[[list, list[Array], Any, Any], list[Array]]
    one: Any  # the tree of results, with one token's shapes and dtypes
    closed_over: Any = ()  # the arrays that the function closes over, a tree
    has_aux: bool = False  # only the first result, a number per token, is differentiated
    multiplied: bool = True  # False: it takes `Logits`, which aren't multiplied out yet
    halved: bool = False  # with bfloat16 states and head it stores at most one bfloat16 number per logit
    filler: tuple[float, ...] | None = None  # what others are in padding, so that it is finite at a hidden state of 0
    refused: str = ""  # effects of it that a derivative may not repeat

    @property
    def trained(self) -> int | None:
        """Which result alone is differentiated, if it is a number per token; None if there is no such result."""
        ones = jax.tree.leaves(self.one)
        inexact = [i for i, x in enumerate(ones) if jnp.issubdtype(x.dtype, jnp.inexact)]
        trained = [0] if self.has_aux else inexact
        return trained[0] if len(trained) == 1 and ones[trained[0]].shape == () else None

    @property
    def is_double(self) -> bool:
        """Whether a result is float64."""
        return jnp.float64 in [x.dtype for x in jax.tree.leaves(self.one)]

    def require_real(self, name: str) -> None:
        """Raises if a result, which is to be summed or weighted, isn't real."""
        odd = [x for x in jax.tree.leaves(self.one) if not is_real(x)]
        if odd:
            raise TypeError(
                f"{name}: results that are summed or weighted must be real (floating-point, integer or bool); function"
                f" returns {', '.join(map(brief, odd))} for a token. Convert them to real numbers, or use"
                f' reduction="none" without weights.'
            )

    def require_zeros(self, name: str) -> None:
        """Raises if a result can't be 0, as it is for a token that is left out."""
        if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in jax.tree.leaves(self.one)):
            raise TypeError(
                f"{name}: with `where`, weights or batch_invariant, function must not return random keys, since the"
                f" result of a masked token is 0, and no key is 0. Return jax.random.key_data(key)."
            )

    def of_inputs(self, dtypes: Any, products: Products) -> Callable:
        """function(platform, inputs of a chunk), where what is shared had these dtypes before it was made `wide`. The
        results of tokens that aren't kept are 0. With a filler they are 0 only after the loop has joined the chunks."""
        # JAX's caches keep this function, so it may not hold `self`: there may be tracers in the rest of it.
        function, multiplied, filler = self.function, self.multiplied, self.filler
        dtypes_closed_over = dtypes_of(self.closed_over)

        def of_chunk(platform: Platform, inputs: Inputs) -> list[Array]:
            hidden, others, _, kept, heads, shared = inputs

            def or_first(arrays, first):
                return [jnp.where(expanded(kept, x), x, f[None]) for x, f in zip(arrays, first, strict=True)]

            if filler is None:
                hidden, others = map(or_first, (hidden, others), shared.first)
            else:  # padding holds zeros already: only other fillers are put in
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
