"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Collective(NamedTuple):
    kind: str
    size: int  # numbers, of what it returns
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Each array that a collective returns, but of those among one device each, which send nothing."""
    found, computation = [], ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line and not line[0].isspace():
            computation = line
        match = re.search(rf"= \(?((?:\w+\[[\d,]*\]\S*(?:, )?)+)\)? ({KINDS})(?:-start)?\(", line)
        assert match or not re.search(rf" (?:{KINDS})(?:-start)?\(", line), line
        if match and "replica_groups={{0},{1}" not in line:
            shapes, kind = match.groups()
            for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
                size = math.prod(int(k) for k in dims.split(",") if k)
                found.append(Collective(kind, size, not computation.startswith("ENTRY")))
    return found
