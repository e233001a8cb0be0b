"""How rows are summed: `way` says what is asked of each way, `passes` a CPU's, `reduction` an accelerator's, `chain` a
GPU's of short rows, and `kernel` which one where; `known_label` how one reading does for a label's row. Formulas
(`_softmax.py`) name none of them."""
