"""Builds the documentation as pages: `python -m bench.pages [FOLDER]`. Needs the extra `docs`.

MkDocs builds the pages from READMEs, notebooks and the pages in docs/. In a page of docs/, mkdocstrings replaces
`::: jce.NAME` by the docstring of that function, and a comment such as `<!-- jce/README.md: Heads -->` is replaced by
this section of the file. The pages can be read without a network.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from jce._programs.command_line import Parser, run

PROGRAM = "python -m bench.pages"

try:
    import material  # noqa: F401  # without it, MkDocs would print a traceback
    import mkdocstrings  # noqa: F401
    from math_core import LatexToMathML

    from bench.pages import switching
    from bench.pages.checked import problems
except ModuleNotFoundError as error:
    print(f"{PROGRAM} needs {error.name}, which isn't installed: pip install -e '.[docs]'", file=sys.stderr)
    raise SystemExit(2) from None

ROOT, HERE = pathlib.Path(__file__).parents[2], pathlib.Path(__file__).parent


def build(folder: pathlib.Path) -> None:
    """Writes the pages to the folder.

    If a link is dead, or a public name isn't on exactly one page, exits with a message and writes nothing.
    """
    with tempfile.TemporaryDirectory() as project:
        stage(pathlib.Path(project))
        # Without --quiet: it would hide warnings from --strict.
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{PROGRAM}: MkDocs can't build the pages\n{done.stdout}{done.stderr}")
        site = pathlib.Path(project, "site")
        (site / "404.html").unlink()  # only a server needs it; its links work only at a server's root
        if found := problems(site):
            raise SystemExit("\n".join([f"{PROGRAM}: the pages have these problems", *found]))
        shutil.copytree(site, folder, dirs_exist_ok=True)


def stage(project: pathlib.Path) -> None:
    """Writes the input of MkDocs. Each file keeps its place in the repository, so that links between files work."""
    docs = project / "docs"
    shutil.copytree(HERE / "docs", docs)
    shutil.copy(HERE / "mkdocs.yml", project)
    for page in docs.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"<!-- (.*): (.*) -->\n", lambda found: _section(found[1], found[2]), text)
        text = text.replace(
            "<!-- losses -->", switching.tables((ROOT / "notebooks" / "0_switch.py").read_text("utf-8"))
        )
        page.write_text(text, encoding="utf-8")
    for name in ("notebooks/README.md", "bench/README.md", "tests/README.md", "jce/CONTRIBUTING.md"):
        page = (docs / name).with_name("index.md")
        page.parent.mkdir(exist_ok=True)
        page.write_text(_linked((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    for kind in ("notebooks/*.png", "bench/results/*.png", "notebooks/examples/*.py"):
        for path in ROOT.glob(kind):
            (docs / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, docs / path.relative_to(ROOT))
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        _write_notebook(notebook, docs / "notebooks")


def _section(file: str, title: str) -> str:
    """The section of a file, with its heading. The text before the first section counts as a section too: its title is
    the title of the file."""
    sections = re.split(r"^(?=## )", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = (text for text in sections if text.partition("\n")[0].lstrip("# ") == title)
    return _linked(text)


def _linked(text: str) -> str:
    """Replaces links to files by links to their pages."""
    text = re.sub(r"\]\(jce/README\.md#([\w-]+)\)", r"][\1]", text)  # autorefs finds the page
    text = text.replace("](jce/README.md)", "](conventions.md)").replace("](README.md)", "](../conventions.md)")
    text = re.sub(r"(\]\([^):]*)\.ipynb\)", r"\1.md)", text)
    return re.sub(r"(\]\([^):]*)(?:README|CONTRIBUTING)\.md\)", r"\1index.md)", text)


def _write_notebook(notebook: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a rendered notebook as Markdown: its text, its code, its printed output and its pictures.

    The first line of a cell that draws a picture describes the picture, as in Quarto: `#| fig-alt: ...`.
    """
    parts, heading = [], ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.*)$", source, re.MULTILINE) or [heading])[-1]
            parts.append(_with_mathml(source))
            continue
        described = re.match(r"#\| fig-alt: (.*)\n", source)
        source, description = source[described.end() if described else 0 :], described[1] if described else heading
        parts.append(f"````python\n{source}\n````")
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                name = f"{notebook.stem}_{len(parts)}.png"
                (folder / name).write_bytes(base64.b64decode(picture))
                parts.append(f"![{description}]({name})")
            else:
                text = "".join(output.get("text") or output["data"]["text/plain"])
                parts.append(f"````text\n{text.rstrip()}\n````")
    (folder / f"{notebook.stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _with_mathml(text: str) -> str:
    """Replaces TeX by MathML. Browsers display MathML without help, but TeX would need a script and its fonts."""
    converter = LatexToMathML()

    def mathml(found: re.Match) -> str:
        formula = converter.convert_with_local_state(found[1] or found[2], displaystyle=bool(found[1]))
        # In a span, because Markdown ends a paragraph before a line that begins with <math>
        return formula if found[1] else f"<span>{formula}</span>"

    return re.sub(r"\$\$(.+?)\$\$|\$(.+?)\$", mathml, text, flags=re.DOTALL)


def main() -> None:
    parser = Parser(prog=PROGRAM, description="Write the documentation as web pages to FOLDER (default: site).")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=pathlib.Path, default="site", help="The folder.")
    folder = parser.parse_args().folder
    build(folder)
    print(folder / "index.html")


if __name__ == "__main__":
    run(main)
