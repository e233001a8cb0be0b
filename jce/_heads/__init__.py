"""A head and its loss in one: functions of a vocabulary's logits, token by token, without the logits of all tokens.

Each public function has a file. They share over_tokens (arguments, tokens left out, reduction), token_loop and chunks
(the loop), places (each device's part) and products. They import the files of quantities, which never import from here.
"""
