"""Reads from the text of a compiled program which arrays it sends between devices."""

import math
import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Collective(NamedTuple):
    kind: str
    size: int  # how many numbers it returns
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Each array that a collective returns, except for collectives over a single device, which send nothing."""
    found, computation = [], ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line and not line[0].isspace():
            computation = line
        match = re.search(rf"= \(?((?:\w+\[[\d,]*\]\S*(?:, )?)+)\)? ({KINDS})(?:-start)?\(", line)
        assert match or not re.search(rf" (?:{KINDS})(?:-start)?\(", line), line
        if match and group_size(line) > 1:
            shapes, kind = match.groups()
            for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
                size = math.prod(int(k) for k in dims.split(",") if k)
                found.append(Collective(kind, size, not computation.startswith("ENTRY")))
    return found


def group_size(line: str) -> int:
    """The number of devices of a collective, in all notations of XLA."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return 1 + match[1].count(",")
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2]))
    return 2  # collective-permute has no groups; for others the size is unknown
