"""Parses the text of a compiled program, a scheduled HLO module, into computations of linked instructions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Unreadable(ValueError):
    """The cost of an instruction is not known."""


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
WIDTHS |= {"f64": 8, "s64": 8, "u64": 8, "token": 0}


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]  # a TPU pads the minor dimensions to multiples of them
    space: int  # 0 is the device's memory; on a TPU 1 is VMEM

    @property
    def numbers(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The size in memory, with padding. Each further tile splits the tile before it."""
        dims = [self.dims[i] for i in reversed(self.minor_to_major)]
        for tile in self.tiles:
            dims = [1] * (len(tile) - len(dims)) + dims
            split = len(dims) - len(tile)
            dims = [*dims[:split], *(-(-n // t) for n, t in zip(dims[split:], tile, strict=True)), *tile]
        return math.prod(dims) * WIDTHS[self.dtype]


@dataclass(eq=False)
class Instruction:
    name: str
    opcode: str
    shape: Array | list  # a list for a tuple
    operands: list[Instruction]
    literal: str  # the text in the parentheses
    attributes: str
    called: dict[str, Computation]  # by the attribute that names the computation
    root: bool
    users: list[tuple[Instruction, int]] = field(default_factory=list)  # and which of their operands this is

    @cached_property
    def config(self) -> dict:
        start = self.attributes.find("backend_config={")
        return json.JSONDecoder().raw_decode(self.attributes, start + len("backend_config="))[0] if start >= 0 else {}

    def attribute(self, name: str, default: str = "") -> str:
        """The value of an attribute: a word, or the text in braces or quotation marks."""
        match = re.search(rf", {name}=(?:\{{([^{{}}]*)\}}|\"([^\"]*)\"|([^\s,]+))", self.attributes)
        return next(x for x in match.groups() if x is not None) if match else default

    def integers(self, name: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", self.attribute(name))]


@dataclass(eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(x for x in self.instructions.values() if x.root)

    @cached_property
    def results(self) -> list[Instruction]:
        return self.root.operands if self.root.opcode == "tuple" else [self.root]

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.literal))


def leaves(shape: Array | list) -> list[Array]:
    return [shape] if isinstance(shape, Array) else [leaf for part in shape for leaf in leaves(part)]


UNREAD = re.compile(r'/\*.*?\*/|, (?:metadata|frontend_attributes)=\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{[^{}]*\})*\}')
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{")
ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
CALLED = re.compile(r", (calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")


def entry(text: str) -> Computation:
    """The entry computation of the program. Its instructions link to the computations that they call."""
    computations: dict[str, Computation] = {}
    main = current = None
    for line in text.splitlines():
        if header := HEADER.fullmatch(line):
            current = computations[header[2]] = Computation(header[2])
            main = current if header[1] else main
        elif current and (match := ASSIGNMENT.fullmatch(UNREAD.sub("", line))):
            root, name, right = match.groups()
            try:
                current.instructions[name] = _instruction(name, right, bool(root), current.instructions, computations)
            except KeyError as error:
                raise Unreadable(f"{name}: {error.args[0]} isn't defined before it") from None
    if main is None:
        raise Unreadable("there is no entry computation")
    return main


def _instruction(name: str, right: str, root: bool, earlier: dict, computations: dict) -> Instruction:
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    shape, rest = _shape(name, right[:end]), right[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    opcode, literal, attributes = rest[:start], rest[start + 1 : close - 1], rest[close:]
    words = [] if opcode in ("parameter", "constant") else [part.split()[-1].lstrip("%") for part in _split(literal)]
    called = {key: computations[callee] for key, callee in CALLED.findall(attributes)}
    if branches := re.search(r", branch_computations=\{([^{}]*)\}", attributes):
        called |= {f"branch {i}": computations[b.lstrip("%")] for i, b in enumerate(branches[1].split(", "))}
    made = Instruction(name, opcode, shape, [earlier[word] for word in words], literal, attributes, called, root)
    for i, operand in enumerate(made.operands):
        operand.users.append((made, i))
    return made


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise Unreadable(f"a parenthesis that isn't closed: {text}")


def _split(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def _shape(name: str, text: str) -> Array | list:
    if text.startswith("("):
        return [_shape(name, part) for part in _split(text[1:-1])]
    match = ARRAY.fullmatch(text)
    if match is None or match[1] not in WIDTHS:
        raise Unreadable(f"{name}: the shape {text}")
    dims = tuple(int(n) for n in match[2].split(",") if n)
    order, _, rest = (match[3] or "").partition(":")
    minor_to_major = tuple(int(n) for n in order.split(",") if n) or tuple(reversed(range(len(dims))))
    layout = re.fullmatch(r"(?:T((?:\([\d,]+\))+))?(?:S\((\d+)\))?", rest)
    if layout is None:
        raise Unreadable(f"{name}: the layout of {text}")
    tiles = tuple(tuple(int(n) for n in tile.split(",")) for tile in re.findall(r"\(([\d,]+)\)", layout[1] or ""))
    return Array(match[1], dims, minor_to_major, tiles, int(layout[2] or 0))
