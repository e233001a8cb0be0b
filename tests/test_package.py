"""The package as a whole: its names, its documentation, and what importing it does."""

import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jce
from tests.kernels import HEADS, TABLE

README = pathlib.Path(__file__).parents[1] / "README.md"
PUBLIC = {name: getattr(jce, name) for name in jce.__all__}
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:")
KERNEL_SECTIONS = ("At the boundary:", "Derivative:", "Not checked:")

each_public = pytest.mark.parametrize("name", PUBLIC)


def test_every_kernel_is_a_row_of_the_table():
    others = {"check_distribution", "sharded_linear_cross_entropy"}
    assert {kernel.name for kernel in TABLE + HEADS} == set(PUBLIC) - others


@each_public
def test_docstring_sections(name):
    doc = inspect.getdoc(PUBLIC[name])
    places = [doc.find(f"\n{section}\n") for section in SECTIONS]
    assert -1 not in places, [s for s, place in zip(SECTIONS, places, strict=True) if place < 0]
    assert places == sorted(places)
    if name != "check_distribution":
        assert "nats" in doc.splitlines()[0]
        assert all(f"\n{section}\n" in doc for section in KERNEL_SECTIONS)
    for argument in inspect.signature(PUBLIC[name]).parameters:
        assert re.search(rf"^  {argument}: ", doc, re.MULTILINE), argument


@each_public
def test_docstring_examples(name):
    names = {"jce": jce, "jax": jax, "jnp": jnp}
    examples = doctest.DocTestFinder().find(inspect.unwrap(PUBLIC[name]), name, module=False, globs=names)
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


@each_public
def test_the_readme_names_it(name):
    assert f"`{name}(" in README.read_text()


def test_readme_examples():
    assert len(README.read_text().splitlines()) <= 295
    results = doctest.testfile(str(README), module_relative=False, globs={})
    assert results.attempted > 5
    assert results.failed == 0


def test_import_starts_no_backend_and_needs_only_jax():
    """In a fresh interpreter: no device is touched, no option changed, and no extra imported."""
    script = """
import jax, sys
before = dict(jax.config.values)
import jce
assert dict(jax.config.values) == before
assert not jax._src.xla_bridge._backends
assert not {"optax", "matplotlib", "tqdm", "chex", "scipy.stats"} & set(sys.modules)
assert jce.__version__.count(".") == 2
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
