"""What daemons and programs say, put in a form that can be compared and shown."""

import difflib
import json
from collections.abc import Mapping, Sequence

from nbdbackup.job.events import Json
from tests.oracle.side import Side


def difference(expected: Json, actual: Json) -> list[str]:
    """Lines that show both: `- ` what is only expected, `+ ` what is only there."""
    return [line for line in difflib.ndiff(_lines(expected), _lines(actual)) if not line.startswith("?")]


def _lines(value: Json) -> list[str]:
    if isinstance(value, str):
        return value.splitlines()
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item, sort_keys=True) for item in value]
    return json.dumps(value, indent=1, sort_keys=True).splitlines()


def first_difference(expected: bytes, actual: bytes) -> str:
    """Where and how they differ, which they do."""
    if len(expected) != len(actual):
        return f"{len(actual)} bytes instead of {len(expected)}"
    place = next(place for place in range(len(expected)) if expected[place] != actual[place])
    count = sum(one != other for one, other in zip(expected, actual, strict=True))
    return f"{count} bytes differ, first at {place}: {actual[place]:#04x} instead of {expected[place]:#04x}"


def uri(export: str) -> str:
    """Of an export of either side."""
    return f"nbd+unix:///{export}?socket={{dir}}/nbd.sock"


def without_times(output: str) -> str:
    """Less the line on speed that follows each of qemu-io's commands."""
    return "\n".join(line for line in output.splitlines() if " ops; " not in line)


def joined(extents: Sequence[Mapping[str, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one type are one: how far an answer goes is up to the server."""
    runs: list[tuple[int, int, int]] = []
    for extent in extents:
        offset, length, kind = extent["offset"], extent["length"], extent["type"]
        if runs and runs[-1][2] == kind:
            offset, length = runs[-1][0], runs[-1][1] + length
            runs.pop()
        runs.append((offset, length, kind))
    return runs


async def bitmaps_of(side: Side) -> dict[str, Json]:
    """By node, and by name: their order says nothing. Those without a name are the daemon's own."""
    found: dict[str, Json] = {}
    for node in await side.listed("query-named-block-nodes"):
        listed = node.get("dirty-bitmaps", [])
        assert isinstance(listed, list)
        named = {str(info["name"]): info for info in listed if isinstance(info, dict) and info.get("name")}
        if named:
            found[str(node["node-name"])] = [named[name] for name in sorted(named)]
    return found
