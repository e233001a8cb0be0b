"""An extension of Griffe: the lines under `Example:` are code, as those under its own `Examples:` are.

Where a docstring's last line says `See "Arguments" in jce/README.md.`, this is a link to the page with that section.
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
