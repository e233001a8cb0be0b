"""How rows are summed. `way` is the interface. `passes` implements it for a CPU, `reduction` for an accelerator, and
`chain` for a GPU with short rows. `kernel` chooses among them. `known_label` sums a label's row in one reading. The
formulas (`softmax.py`) use only the interface."""
