"""An extension of Markdown: code such as `entropy(p)` or `help(jce.entropy)`, on any page, links to its function."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

import jce

NAME = re.compile(rf"(?:^|jce\.)({'|'.join(jce.__all__)})(?!\w)")


class Names(Treeprocessor):
    def run(self, root: Element) -> None:
        for parent in root.iter():
            if parent.tag in ("a", "autoref", "pre"):
                continue
            for place, child in enumerate(parent):
                if child.tag == "code" and (found := NAME.search("".join(child.itertext()))):
                    parent[place] = link = Element("autoref", identifier=f"jce.{found[1]}")
                    link.tail, child.tail = child.tail, None
                    link.append(child)


class NamesExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(Names(md), "names", 15)  # after inline code, whose priority is 20


def makeExtension(**options) -> NamesExtension:
    return NamesExtension(**options)
