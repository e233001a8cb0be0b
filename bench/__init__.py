"""Measurements and models of what jce costs: `python -m bench`, and beside it `bench.devices` and `bench.readme`."""

import importlib.util
import pathlib

# From its file, since the import of jce takes a second, in which Ctrl-C is to be heard already.
_file = pathlib.Path(__file__).parents[1] / "jce" / "_programs/interrupts.py"
if (_spec := importlib.util.spec_from_file_location("jce._programs.interrupts", _file)) and _spec.loader:
    _interrupts = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_interrupts)
    _interrupts.end_if_program_of(__name__)
