"""A head and its loss in one: functions of a vocabulary's logits, token by token, without the logits of all tokens.

Each public function has a file here. What a caller gives to it goes through four folders, in this order:

    arguments/   Arguments are checked, and become `Inputs`: arrays of tokens, heads, and what all tokens share. Options
                 become `Settings`, and numbers constants or traced arrays.
    places/      Where tokens or classes are split over devices, each device gets its part of the inputs
                 (`jax.shard_map`), with all tokens in one axis, and with a mark on those that take part.
    loop/        A `Loop` takes the tokens chunk by chunk. It has a result for each token, or sums of them; of these it
                 computes the gradient at the same time.
    loss/        For each chunk it calls a `ChunkFunction`, such as a label's loss, of the chunk's logits.

`over_tokens.py` calls them one after another, and reduces the results. These files import those of quantities, which
never import from here.
"""
