"""How rows are summed: `way` is the interface, `passes` a CPU's way, `reduction` an accelerator's, `chain` a GPU's for
short rows; `kernel` chooses among them; `known_label` sums a label's row in one reading. Formulas (`softmax.py`) know
the interface alone."""
