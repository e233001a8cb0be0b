"""Tests of the documentation's pages: functions, notebooks, READMEs and links. Needs the extra `docs`."""

import html
import inspect
import pathlib
import re
import shutil

import pytest

import jce

EXTRA = "needs the extra 'docs'"
for package in ("material", "mkdocstrings", "math_core"):
    pytest.importorskip(package, reason=EXTRA)

from bench.pages import __main__ as program  # noqa: E402
from bench.pages.checked import problems  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    program.build(folder)
    return folder


def words(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_functions(site):
    """Each function has its signature, a row for each argument, all sections of its docstring, and links."""
    text = "".join(page.read_text(encoding="utf-8") for page in site.glob("*.html"))
    for name in jce.__all__:
        (section,) = re.findall(rf'<h2 id="jce\.{name}".*?(?=<h2|</article>)', text, re.DOTALL)
        function = getattr(jce, name)
        rows = re.findall(r"<tr[^>]*>\s*<td[^>]*>\s*<code>\*?(\w+)</code>", section)
        assert rows[: len(inspect.signature(function).parameters)] == [*inspect.signature(function).parameters], name
        signature = words(section.partition("<p>")[0])
        assert all(parameter in signature for parameter in inspect.signature(function).parameters), name
        assert words(section).count("jce._") == 0
        for title in re.findall(r"^([A-Z][a-z ]+):$", inspect.getdoc(function), re.MULTILINE):
            shown = {"Args": "Parameters", "Example": "Examples"}.get(title, title)
            assert re.search(rf"<(?:span|summary)[^>]*>{shown}:?<", section), (name, title)
        assert '<span class="gp">&gt;&gt;&gt; </span>' in section, name
        *_, last = inspect.getdoc(function).splitlines()
        for title in re.findall(r'"([^"]*)"', last) if last.endswith(" in jce/README.md.") else []:
            place = title.lower().replace(" ", "-")
            assert re.search(rf'<a [^>]*href="[^"]*#{place}">{title}</a>', section), (name, title)


def test_notebooks(site):
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    assert len(notebooks) == 9
    front = (site / "index.html").read_text(encoding="utf-8")
    for notebook in notebooks:
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert re.search(rf'<img alt="\w[^"]+" src="{notebook.stem}_', page)
        assert page.count("<math") >= notebook.read_text(encoding="utf-8").count("$$") / 2
        assert "$" not in words(re.sub(r"<pre.*?</pre>|<script.*?</script>", "", page, flags=re.DOTALL)), notebook.stem
        assert not re.search(r"<p>\s*[,.;:]", page), "a formula ends a paragraph"
        assert f'href="notebooks/{notebook.stem}.html"' in front


def test_the_readmes_are_there(site):
    """Each heading of the READMEs is on some page, and the names in the table of functions are links."""
    pages = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    headings = {words(heading) for heading in re.findall(r"<h[1-3] id.*?</h[1-3]>", pages, re.DOTALL)}
    for readme in (ROOT / "README.md", *ROOT.glob("[a-z]*/*.md")):
        for heading in re.findall(r"^## (.*)$", readme.read_text(encoding="utf-8"), re.MULTILINE):
            assert any(heading in shown for shown in headings), heading
    table = (site / "start.html").read_text(encoding="utf-8")
    for name in jce.__all__:
        assert re.search(rf'href="\w+\.html#jce\.{name}"><code>', table), name


def test_a_dead_link_stops_the_build(tmp_path, monkeypatch):
    def stage(project):
        shutil.copy(pathlib.Path(program.__file__).parent / "mkdocs.yml", project)
        (project / "docs").mkdir()
        (project / "docs" / "index.md").write_text("[dead](nowhere.md) `jce.entropy`")

    monkeypatch.setattr(program, "stage", stage)
    with pytest.raises(SystemExit) as raised:
        program.build(tmp_path / "site")
    assert "contains a link 'nowhere.md', but the target is not found" in str(raised.value)
    assert "Could not find cross-reference target 'jce.entropy'" in str(raised.value)
    assert not (tmp_path / "site").exists()


def test_problems_are_found(tmp_path):
    """Problems in hand-written pages are found."""
    (tmp_path / "index.html").write_text(
        '<h2 id="jce.entropy"></h2><a href="none.html"></a><a href="#none"></a><img src="index.html">'
        '<script src="https://cdn.example/x.js"></script>'
    )
    (tmp_path / "sheet.css").write_text('@import "//cdn.example/x.css"; a { background: url(data:image/png) }')
    found = problems(tmp_path)
    assert [line for line in found if line.startswith("index.html: ")] == [
        "index.html: none.html leads nowhere",
        "index.html: #none leads to a page without that place",
        "index.html: https://cdn.example/x.js is loaded from a network",
        "index.html: the picture index.html has no text",
    ]
    assert "sheet.css: //cdn.example/x.css is loaded from a network" in found
    assert len(found) == 5 + len(jce.__all__) - 1


def test_the_page_for_switching_has_every_loss_of_the_notebook(site):
    page = (site / "switching.html").read_text(encoding="utf-8")
    notebook = (ROOT / "notebooks" / "0_switch.py").read_text(encoding="utf-8")
    names = re.findall(r'^row\(\s*"([^"]*)"', notebook, re.MULTILINE)
    assert len(names) == 43
    assert all(f"<td>{name}</td>" in page for name in names)
    for line in ("linear(y, h, w, weights=by_class[y])", "jensen_shannon_divergence_with_logits(x, other)"):
        assert line in words(page)
