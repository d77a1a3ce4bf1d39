"""What verbs print: JSON for scripts, plain aligned columns for people."""

import json
import sys
from collections.abc import Sequence


def print_json(value: object) -> None:
    """Print `value` as JSON, indented, in the order that it came."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_json_line(value: object) -> None:
    """Print `value` as one line of JSON, at once: for streams that another program follows."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; nothing but the heads if there are no rows."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """`text`, which somebody else chose, without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Tell the person at the terminal; never mixed up with the output proper."""
    print(text, file=sys.stderr, flush=True)
