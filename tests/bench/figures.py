"""What is measured, and what becomes of it: medians, spreads, and ratios.

A case has one or more figures. Every contender has one value of each in each round, `Raw` holds them
all, and everything else here is derived from that. A ratio says how many *times better*: for a rate,
ours / theirs; for a time or a size, of which less is better, theirs / ours. So above 1 is always good.

Rounds are interleaved, so the values of one round were measured close together: the spread of a ratio is
that of the rounds' own ratios. The ratio of the medians lies within.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Raw = dict[str, dict[str, dict[str, list[float]]]]
"""case -> contender -> figure -> one value a round"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that a case measures; `name` is "" where a case has no other."""

    unit: str
    name: str = ""
    less_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's values of one figure beside another's, or against a limit (`peer` is "" then).

    `expected`: the least ratio that is wanted; of a row without a peer, the largest value.
    """

    group: str
    case: str
    figure: Figure
    contender: str
    values: Sequence[float]
    peer: str = ""
    peer_values: Sequence[float] = ()
    expected: float | None = None

    @property
    def label(self) -> str:
        """The case's name, and the figure's if it has one."""
        return f"{self.case} {self.figure.name}".strip()

    @property
    def ratio(self) -> float:
        """How many times better than the peer, by medians."""
        return self._ratio(statistics.median(self.values), statistics.median(self.peer_values))

    @property
    def ratios(self) -> list[float]:
        """That of each round in which both were measured."""
        return [self._ratio(*pair) for pair in zip(self.values, self.peer_values, strict=False)]

    @property
    def met(self) -> bool | None:
        """Whether what is expected is so; None: nothing is."""
        if self.expected is None:
            return None
        if not self.peer:
            return statistics.median(self.values) <= self.expected
        return self.ratio >= self.expected

    def _ratio(self, ours: float, theirs: float) -> float:
        return theirs / ours if self.figure.less_is_better else ours / theirs


@dataclass(frozen=True, slots=True)
class Pairs:
    """Who is compared with whom in a case.

    The first contender with each other one; with a `base`, each with that one. `expected` has the least
    ratio of the case's first figure, by the name of whoever is not the first, or not the base; `at_most`
    the largest value of that figure for the first.
    """

    base: str = ""
    expected: Mapping[str, float] | None = None
    at_most: float | None = None


def number(value: float) -> str:
    """With three significant figures at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def spread(values: Sequence[float]) -> float:
    """(max - min) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def compare(
    group: str,
    case: str,
    figures: Sequence[Figure],
    pairs: Pairs,
    first: str,
    measured: Mapping[str, Mapping[str, list[float]]],
) -> list[Row]:
    """The rows of one case, whose contender `first` is; contenders that were not measured have none."""
    rows = []
    fixed = pairs.base or first
    for number, figure in enumerate(figures):
        values = {name: rounds for name in measured if (rounds := measured[name].get(figure.name))}
        if fixed not in values:
            continue
        expected = pairs.expected if number == 0 and pairs.expected else {}
        if number == 0 and pairs.at_most is not None and first in values:
            rows.append(Row(group, case, figure, first, values[first], expected=pairs.at_most))
        for name in values:
            if name != fixed:
                one, peer = (name, fixed) if pairs.base else (fixed, name)
                rows.append(
                    Row(group, case, figure, one, values[one], peer, values[peer], expected.get(name))
                )
    return rows
