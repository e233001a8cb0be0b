"""A head and its loss in one: functions of a vocabulary's logits, token by token, without the logits of all tokens.

Each public function has a file. Under them: over_tokens (arguments, tokens left out, reduction), token_loop and chunks
(the loop), places (each device's part), products. They import the quantities, which know nothing of them.
"""
