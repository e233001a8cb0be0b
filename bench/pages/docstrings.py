"""An extension of Griffe for this project's docstrings.

A section `Example:` is treated as Griffe's own `Examples:`, so its lines are shown as code. A last line such as
`See "Arguments" in jce/README.md.` becomes a link to the page with that section.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from markdown.extensions.toc import slugify

SEE = re.compile(r"^See (.*) in jce/README\.md\.$", re.MULTILINE)


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = SEE.sub(lambda found: f"See {_linked(found[1])}.", text)


def _linked(titles: str) -> str:
    return re.sub(r'"([^"]+)"', lambda title: f"[{title[1]}][{slugify(title[1], '-')}]", titles)
