"""The ratios of a run as a picture (SVG): bars on a logarithmic scale from 1, "as fast as the peer".

A bar's whisker is the spread of the rounds' ratios, a tick what is wanted. Colours say whether that is met,
and so do words, for those who do not see them; both fit a light page and a dark one.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from tests.bench.figures import Row, number

WIDTH = 960
LABELS = 460
VALUES = 150
LINE = 18
HEADING = 30
MARGIN = 12
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10)
KINDS = {True: "met", False: "missed", None: "plain"}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.heading { font-weight: 600; font-size: 13px } .end { text-anchor: end } .middle { text-anchor: middle }
.faint { fill: #59636e } .grid { stroke: #d1d9e0 } .one { stroke: #59636e }
.whisker, .wanted { stroke: #1f2328 } .wanted { stroke-width: 2; stroke-dasharray: 2 1 }
.met { fill: #3fa45b } .missed { fill: #d9822b } .plain { fill: #7d9ec9 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .faint { fill: #9198a1 } .grid { stroke: #3d444d } .one { stroke: #9198a1 }
  .whisker, .wanted { stroke: #e6edf3 }
  .met { fill: #2f8f4e } .missed { fill: #bb6a1a } .plain { fill: #4f74a8 }
}
"""


class Scale:
    """From a ratio to pixels from the left: what `rows` need of `STEPS`, and one to either side of 1."""

    def __init__(self, rows: Sequence[Row]) -> None:
        found = [0.5, 2.0]
        for row in rows:
            found += [*row.ratios, row.expected or 1.0]
        low = max((step for step in STEPS if step <= min(found)), default=STEPS[0])
        high = min((step for step in STEPS if step >= max(found)), default=STEPS[-1])
        self.steps = [step for step in STEPS if low <= step <= high]
        self._low, self._high = math.log(low), math.log(high)

    def x(self, ratio: float) -> float:
        """What is off the scale is at its end."""
        log = min(max(math.log(ratio), self._low), self._high)
        part = (log - self._low) / (self._high - self._low)
        return round(LABELS + part * (WIDTH - LABELS - VALUES), 1)


def draw(rows: Sequence[Row], title: str) -> str:
    """The picture of every row that has a peer."""
    compared = [row for row in rows if row.peer]
    scale = Scale(compared)
    groups = [(group, list(members)) for group, members in groupby(compared, key=lambda row: row.group)]
    top = 2 * MARGIN + 2 * LINE
    height = top + len(groups) * HEADING + len(compared) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" height="{height}"><title>{escape(title)}</title><style>{STYLE}</style>',
        _text(MARGIN, MARGIN + LINE - 4, title, "heading"),
        _text(
            MARGIN,
            MARGIN + 2 * LINE - 4,
            f"times better; bars end at {STEPS[0]:g} and {STEPS[-1]:g}",
            "faint",
        ),
    ]
    for step in scale.steps:
        x = scale.x(step)
        parts.append(_line(x, top, x, height - MARGIN, "one" if step == 1 else "grid"))
        parts.append(_text(x, top - 4, f"{step:g}", "faint middle"))
    y = top
    for group, members in groups:
        parts.append(_text(MARGIN, y + HEADING - 8, group, "heading"))
        y += HEADING
        for row in members:
            parts += _bar(row, scale, y)
            y += LINE
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(row: Row, scale: Scale, y: int) -> list[str]:
    one, end, middle = scale.x(1), scale.x(row.ratio), y + LINE // 2
    who = f"{row.label}: {row.contender} / {row.peer}"
    wanted = "" if row.expected is None else f", {'has' if row.met else 'misses'} {row.expected:g}"
    left, right = scale.x(min(row.ratios)), scale.x(max(row.ratios))
    parts = [
        _text(LABELS - MARGIN, middle + 4, who, "end"),
        f'<rect class="{KINDS[row.met]}" x="{min(one, end)}" y="{y + 3}" width="{abs(end - one):.1f}"'
        f' height="{LINE - 6}"/>',
        _line(left, middle, right, middle, "whisker"),
        *(_line(x, middle - 3, x, middle + 3, "whisker") for x in (left, right)),
        _text(WIDTH - VALUES + MARGIN, middle + 4, f"{number(row.ratio)}{wanted}", ""),
    ]
    if row.expected is not None:
        x = scale.x(row.expected)
        parts.append(_line(x, y + 1, x, y + LINE - 1, "wanted"))
    return parts


def _text(x: float, y: float, text: str, kinds: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kinds}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'
