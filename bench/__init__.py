"""Measurements and models of the cost and accuracy of jce: `python -m bench`, `bench.devices` and `bench.readme`."""

import pathlib
import runpy

# Importing jce takes a second, and Ctrl-C must work from the start. So this runs the file, without importing jce.
_file = pathlib.Path(__file__).parents[1] / "jce" / "_programs" / "interrupts.py"
runpy.run_path(str(_file))["end_if_program_of"](__name__)
