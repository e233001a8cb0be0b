"""The package as a whole: its names, its documentation, and what importing it does."""

import doctest
import inspect
import os
import pathlib
import pickle
import pydoc
import re
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import pytest

import jce
from tests.kernels import HEADS, TABLE

README = pathlib.Path(__file__).parents[1] / "README.md"
READMES = [README, *sorted(README.parent.glob("[a-z]*/README.md"))]
LAYOUT = README.parent / "jce" / "CONTRIBUTING.md"
PUBLIC = {name: getattr(jce, name) for name in jce.__all__}
SECTIONS = ("Args:", "Returns:", "Raises:")
KERNEL_SECTIONS = ("At the boundary:", "Derivative:", "Not checked:")

each_public = pytest.mark.parametrize("name", PUBLIC)


def test_the_table_has_every_function():
    others = {"check_distribution", "on_mesh", "Linear"}
    assert {kernel.name for kernel in TABLE + HEADS} == set(PUBLIC) - others


@each_public
def test_docstring_sections(name):
    doc = inspect.getdoc(PUBLIC[name])
    places = [doc.find(f"\n{section}\n") for section in SECTIONS]
    assert -1 not in places, [s for s, place in zip(SECTIONS, places, strict=True) if place < 0]
    assert places == sorted(places)
    assert any(paragraph.startswith("Example:\n") for paragraph in doc.split("\n\n")[1:3])
    if name not in ("check_distribution", "on_mesh", "Linear"):
        assert "nats" in doc.splitlines()[0] or name == "linear_map"
        assert all(f"\n{section}\n" in doc for section in KERNEL_SECTIONS)
    for argument in inspect.signature(PUBLIC[name]).parameters:
        assert re.search(rf"^  \*?{argument}: ", doc, re.MULTILINE), argument


@each_public
def test_links_from_docstrings_to_the_readme(name):
    """The last line names sections of jce/README.md: one for each argument that has its own section."""
    doc, arguments = inspect.getdoc(PUBLIC[name]), inspect.signature(PUBLIC[name]).parameters
    (line,) = re.findall(r"\n\nSee (.*) in jce/README\.md\.$", doc) or [""]
    named = re.findall('"([^"]*)"', line)
    readme = README.parent / "jce" / "README.md"
    assert set(named) <= set(re.findall("^##+ (.*)$", readme.read_text(encoding="utf-8"), re.MULTILINE))
    assert ("Excluded classes" in named) == ("axis" in arguments and "where" in arguments)
    assert ("Arguments of heads" in named) == (name in ("on_mesh", "Linear") or "linear" in name)
    assert ("Classes split over devices" in named) == ("axis_name" in arguments)


@each_public
@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.in_turn(5)
def test_docstring_examples(name):
    names = {"jce": jce, "jax": jax, "jnp": jnp}
    examples = doctest.DocTestFinder().find(inspect.unwrap(PUBLIC[name]), name, module=False, globs=names)
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


def test_the_readmes_table_of_functions():
    """The table has every name. If it lists arguments, they are the function's positional and keyword arguments."""
    section = README.read_text(encoding="utf-8").split("## Functions")[1].split("\n## ")[0]
    assert set(PUBLIC) <= set(re.findall(r"\w+", section))
    table = section.split("\nAll functions on the left")[0]
    for name, listed in re.findall(rf"`({'|'.join(PUBLIC)})\(([^)]*)\)", table):
        parameters = inspect.signature(PUBLIC[name]).parameters.values()
        by_position, _, by_keyword = (part.strip(", ") for part in listed.partition("*"))
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        named = by_keyword.split(", ") if by_keyword else []
        assert by_position.split(", ") == positional, name
        assert named == [x for x in keywords if x in named], name
        assert set(keywords) - set(named) <= {"axis", "where", "axis_name"}, name


@each_public
def test_help_of_each_function(name):
    """`help`, documentation tools and editors find a function, its signature, its docstring and its source."""
    title, _, signature, *text = pydoc.plain(pydoc.render_doc(PUBLIC[name])).splitlines()
    kind = "class" if name == "Linear" else "function"
    assert title == f"Python Library Documentation: {kind} {name} in module jce"
    assert signature.startswith(f"{name}(" if kind == "function" else "class Linear(")
    assert any(inspect.getdoc(PUBLIC[name]).splitlines()[0] in line for line in text)
    assert inspect.isfunction(PUBLIC[name]) == (kind == "function")
    assert inspect.getsourcefile(inspect.unwrap(PUBLIC[name])).endswith(".py")


def test_help_of_linear():
    """`help(jce.Linear)` lists the public methods, and no arithmetic operator."""
    page = pydoc.plain(pydoc.render_doc(jce.Linear)).partition("Methods defined here:")[2]
    listed = re.findall(r"^ \|  (\w+)", page, re.MULTILINE)
    assert {"__getitem__", "astype", "of_function", "bias", "logit_soft_cap"} <= {*listed}
    assert not {"__add__", "__rmul__", "__lt__", "__getattr__"} & {*listed}
    assert len(page.splitlines()) < 80


@each_public
def test_public_module_and_type_hints(name):
    """Pickles, pages and errors name `jce`, not a private module. The types of arguments can still be resolved."""
    assert f"{PUBLIC[name].__module__}.{PUBLIC[name].__qualname__}" == f"jce.{name}"
    assert pickle.dumps(PUBLIC[name], 0).startswith(f"cjce\n{name}\n".encode())
    arguments = typing.get_type_hints(PUBLIC[name]).keys() - {"return"}
    assert arguments == set(inspect.signature(PUBLIC[name]).parameters)


def test_a_pickled_linear_loads():
    x = jce.Linear(jnp.ones((2, 4)), jnp.ones((3, 4)), logit_soft_cap=3.0)
    y = pickle.loads(pickle.dumps(x))
    assert (y.hidden.shape, y.head.shape, y.bias, y.logit_soft_cap) == ((2, 4), (3, 4), None, 3.0)


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.wide
def test_help_of_the_package():
    """`help(jce)` lists every function, and the examples of the package's docstring run."""
    page = pydoc.plain(pydoc.render_doc(jce))
    assert all(f"\n    {name}(" in page for name in set(PUBLIC) - {"Linear"})
    assert "\n    class Linear(" in page
    results = doctest.testmod(jce, extraglobs={"jce": jce, "jax": jax, "jnp": jnp})
    assert results.attempted > 0
    assert results.failed == 0


each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)


@pytest.mark.holds_nan
@pytest.mark.usefixtures("float32_by_default")
@each_readme
@pytest.mark.wide
def test_readme_examples(path):
    """The README's train step for Flax is tested in tools/test_frameworks.py."""
    results = doctest.testfile(str(path), module_relative=False, globs={}, encoding="utf-8")
    assert results.failed == 0


@pytest.mark.parametrize("path", [*READMES, LAYOUT], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_readme_links(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in links:
        assert link[1:] in places if link.startswith("#") else (path.parent / link.partition("#")[0]).exists(), link


def test_the_layout_lists_every_file():
    text = LAYOUT.read_text(encoding="utf-8").split("```")[1]
    listed, folders = set(), []
    for indent, name in re.findall(r"^( *)(\w+\.py|\w+/)", text, re.MULTILINE):
        folders = [*folders[: len(indent) // 2], name]
        listed.add("".join(folders))
    files = {path.relative_to(LAYOUT.parents[1]).as_posix() for path in LAYOUT.parent.rglob("*.py")}
    modules = {path for path in files if not path.endswith("/__init__.py")} | {"jce/__init__.py"}
    assert {path for path in listed if path.startswith("jce/") and path.endswith(".py")} == modules


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.slow
def test_import_starts_no_backend_and_needs_only_jax(tmp_path):
    """The import also changes no option, and takes little time compared with the import of JAX."""
    script = """
import sys, time
start = time.process_time()
import jax
of_jax = time.process_time() - start
before = dict(jax.config.values)
import jce
of_both = time.process_time() - start
assert dict(jax.config.values) == before
assert not jax._src.xla_bridge._backends
assert not {"optax", "matplotlib", "tqdm", "chex", "scipy.stats"} & set(sys.modules)
assert jce.__version__.count(".") == 2
print(of_both / of_jax)
"""

    as_installed = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}  # with bytecode

    def ratio() -> float:
        command = [sys.executable, "-W", "error", "-c", script]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=as_installed).stdout)

    assert any(ratio() <= 1.12 for _ in range(5))  # the first writes the bytecode, and the machine may be busy


@pytest.mark.slow
def test_import_without_metadata():
    """If jce's folder is copied into another project, its version says that it is unknown, and tools can parse it."""
    script = """
import importlib.metadata as metadata
def version(name, known=metadata.version):
    if name == "jce":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
import jce
print(jce.__version__)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == "0+unknown\n"
