"""Measurements and models of what jce costs: `python -m bench`, and beside it `bench.devices` and `bench.readme`."""
