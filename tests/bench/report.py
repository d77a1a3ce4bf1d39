"""What a run leaves behind: a table in Markdown, and every raw value as JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from tests.bench.figures import Row, number, spread
from tests.bench.runner import Results

HEAD = (
    "| case | unit | who | median | spread | against | median | spread | times better | rounds | wanted | |",
    "|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|---|",
)
MARKS = {True: "yes", False: "**no**", None: ""}


def table(rows: Sequence[Row], about: Mapping[str, str], results: Results) -> str:
    """The whole report in Markdown: on what it was, a table for each group, what was left out."""
    wanted = [row for row in rows if row.met is not None]
    met = sum(bool(row.met) for row in wanted)
    lines = [", ".join(f"{key}: {value}" for key, value in about.items() if value), ""]
    lines += [f"{met} of {len(wanted)} expectations are met.", ""]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [f"### {group}", "", *HEAD, *map(_line, members), ""]
    if results.left_out:
        lines += ["Left out:", "", *(f"- {line}" for line in results.left_out), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    cells = [f"`{row.label}`", row.figure.unit, row.contender, *_median(row.values)]
    if row.peer:
        low, high = min(row.ratios), max(row.ratios)
        cells += [row.peer, *_median(row.peer_values), number(row.ratio), f"{number(low)} to {number(high)}"]
        cells.append("" if row.expected is None else f"at least {row.expected:g}")
    else:
        cells += ["", "", "", "", "", f"at most {row.expected:g}"]
    return "| " + " | ".join([*cells, MARKS[row.met]]) + " |"


def _median(values: Sequence[float]) -> list[str]:
    return [number(statistics.median(values)), f"{spread(values):.0%}"]


def dump(path: Path, about: Mapping[str, str], results: Results) -> None:
    """Write all that `load` reads."""
    everything = {"about": dict(about), "raw": results.raw, "left out": results.left_out}
    path.write_text(json.dumps(everything, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, str], Results]:
    """What `dump` wrote."""
    read = json.loads(path.read_text())
    return read["about"], Results(read["raw"], read["left out"])
