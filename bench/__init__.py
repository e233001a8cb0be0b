"""Measurements and models of what jce costs; each module runs by `python -m bench.<name>`."""
