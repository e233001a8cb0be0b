"""Functions that take hidden states and a head, and compute a loss per token without the logits of all tokens.

Each public function has a file here. Its arguments pass through four folders, in this order:

    arguments/   Checks the arguments. Arrays become `Inputs`: arrays of tokens, heads, and arrays that all tokens
                 share. Options become `Settings`, and numbers become constants or traced arrays.
    places/      If tokens or classes are split over devices, gives each device its part of the inputs (by
                 `jax.shard_map`). All tokens are then in one axis, and those that are not masked are marked.
    loop/        A `Loop` takes the tokens chunk by chunk. It returns one result per token, or sums over tokens. For
                 sums it computes the gradient in the same loop.
    loss/        The loop calls a `ChunkFunction`, such as the label loss, with the logits of each chunk.

`over_tokens.py` calls them one after another, and reduces the results. These files import from `_quantities`, which
never imports from here.
"""
