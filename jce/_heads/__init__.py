"""A head and its loss in one: functions of a vocabulary's logits, token by token, without the logits of all tokens.

Each public function has a file, and calls `over_tokens`. On the way through it the arguments take these forms:

    TokenOptions, Linear and arrays     what the caller gave
    Arguments                           arrays with checked shapes: of tokens, of the head's rows, shared (`places`)
    Part                                a device's part of them, tokens in one axis, those that don't count marked
    Inputs                              what a loop takes: hidden states, others, heads, shared arrays (`token_loop`)
    Logits                              a chunk of states and their head, multiplied out when asked (`logits`)

The function itself is an `OfChunk`. `token_loop` runs it, as a `Loop`, over `chunks` of the tokens, and sums gradients.
These files import those of quantities, which never import from here.
"""
