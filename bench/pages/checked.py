"""Checks for built pages, whichever tool built them.

They find dead links, public names without a page, pictures without text, and files that are loaded from a network.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import jce

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class Page(HTMLParser):
    """A page's link targets, its links, the files that a browser loads with it, and its pictures without a text."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.without_text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids.update(given[key] for key in ("id", "name") if key in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if url := given.get(LOADED.get(tag, "")):
            self.loaded.append(url)
        if tag == "img" and not given.get("alt"):
            self.without_text.append(given["src"])


def problems(site: pathlib.Path) -> list[str]:
    """One line for each problem."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = [f"{path.relative_to(site)}: {what}" for path, page in pages.items() for what in _of_page(page, pages)]
    for name in jce.__all__:
        places = [page for page in pages.values() if f"jce.{name}" in page.ids]
        if len(places) != 1:
            found.append(f"jce.{name} is on {len(places)} pages, not on 1")
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')]*)""", sheet.read_text(encoding="utf-8")):
            found.append(f"{sheet.relative_to(site)}: {url} is loaded from a network")
    return found


def _of_page(page: Page, pages: dict[pathlib.Path, Page]) -> Iterator[str]:
    for url in page.links + page.loaded:
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            if url in page.loaded and parts.scheme != "data":
                yield f"{url} is loaded from a network"
            continue
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
        if not target.is_file():
            yield f"{url} leads nowhere"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            yield f"{url} leads to a page without that place"
    for url in page.without_text:
        yield f"the picture {url} has no text"
