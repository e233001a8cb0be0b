"""Train steps to copy, and three programs, for example `python -m notebooks.examples.max_margin`."""

import pathlib
import runpy

# Importing jce takes a second, and Ctrl-C must work from the start. So this runs the file without importing jce.
_file = pathlib.Path(__file__).parents[2] / "jce" / "_programs" / "interrupts.py"
runpy.run_path(str(_file))["end_if_program_of"]("notebooks")
