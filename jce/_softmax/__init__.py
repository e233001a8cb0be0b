"""The softmax of rows of logits, and how each platform sums over a row.

The formulas (`softmax.py`, `compare.py`) use only the interface `Backend`. `passes.py` implements it for a CPU,
`reduction.py` for an accelerator, and `chain.py` for a GPU with short rows. `kernel.py` chooses among them, and
`known_label.py` chooses m for the loss of a label. The terms of these files are:

    row             all entries along the axis of the classes, for one distribution
        backend         how a platform sums over the classes of a row: an instance of a subclass of `Backend`
    kernel          the function of arrays that computes a public function. With the decorator `kernel`, it gets the
                    platform's backend when a program is lowered. (A program that runs on a GPU is a GPU kernel.)

    pass            one traversal of the rows, for a sum or an elementwise result, in which XLA reads x or recomputes it
    m               the number that is subtracted from a row's logits: max x, or the shift of `known_label.py`
    depth           xᵢ - m, a number ≤ 0 if m = max x
    e, Z, s         eᵢ = exp(xᵢ - m), Z = Σ eᵢ over all classes, and s = Σ eᵢ without one class, which is the label or a
                    maximal class (then Z = 1 + s)
    stored          written to memory, N × n numbers for N rows of n classes, instead of recomputed in each pass
    folded          a long row [n] is reshaped to blocks [k, n/k], which a CPU sums faster (`classes.py`)
    number per row  an array without the class axis. `column` gives it a class axis of length 1.
"""
