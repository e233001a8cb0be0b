"""The documentation as pages: `python -m bench.site [FOLDER]`, by extra `docs`.

Every public function with its signature and docstring, by pdoc, and the notebooks as they were rendered, by nbconvert.
"""

from __future__ import annotations

import pathlib
import re

import nbconvert
import pdoc
import pdoc.render

from jce._command_line import Parser, run

ROOT = pathlib.Path(__file__).parents[1]
INDEX = """<!doctype html><html lang="en"><meta charset="utf-8"><title>jce</title>
<body style="font-family: sans-serif; max-width: 40rem; margin: 2rem auto">
<h1>jce</h1><p><a href="jce.html">Functions</a></p><h2>Notebooks</h2><ul>{items}</ul></body></html>
"""


def build(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the pages, and gives their paths."""
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    pdoc.pdoc("jce", output_directory=folder)
    functions = folder / "jce.html"
    functions.write_text(_shorter(functions.read_text(encoding="utf-8")), encoding="utf-8")
    exporter, names = nbconvert.HTMLExporter(), []
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, _ = exporter.from_filename(str(notebook))
        (folder / f"{notebook.stem}.html").write_text(text, encoding="utf-8")
        names.append(notebook.stem)
    items = "".join(f'<li><a href="{name}.html">{name}</a></li>' for name in names)
    (folder / "index.html").write_text(INDEX.format(items=items), encoding="utf-8")
    return [folder / f"{name}.html" for name in ("index", "jce", *names)]


def _shorter(text: str) -> str:
    """Signatures with the type's name for what it stands for, and without our decorator."""
    text = re.sub(r'<div class="decorator decorator-public">.*?</div>', "", text, flags=re.DOTALL)
    union = r'<span class="n">Union</span>(?:(?!</?div|>Union<).)*?complex</span>(.*?)<span class="p">\]</span>'

    def short(found: re.Match) -> str:
        others = [x.strip().split(".")[-1] for x in re.sub(r"<[^>]+>", "", found[1]).split(",")[1:]]
        return " | ".join(["ArrayLike", *("None" if x == "NoneType" else x for x in others)])

    return re.sub(union, short, text, flags=re.DOTALL)


def main() -> None:
    parser = Parser(prog="python -m bench.site", description="Write the documentation as pages.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=pathlib.Path, default="site", help="Where to.")
    for page in build(parser.parse_args().folder):
        print(page)


if __name__ == "__main__":
    run(main)
