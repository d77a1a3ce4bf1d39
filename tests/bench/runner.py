"""The rounds: round 1 of every contender, then round 2 of every contender, and so on.

Whatever else the machine does then falls on all of them; and as the order turns with every round, none is
always the one after the heaviest. What cannot be measured here is left out and said, and keeps nothing else
from being measured.
"""

import functools
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.cases import Case
from tests.bench.contenders import UVLOOP, Contender
from tests.bench.figures import Raw, Row, compare
from tests.bench.fio import PATH, has_nbd_engine
from tests.bench.loads import FIO, Values
from tests.bench.room import MeasureFailed, Room
from tests.support.server import ServerFailed

Say = Callable[[str], None]
FAILURES = (MeasureFailed, ServerFailed, OSError, subprocess.SubprocessError)
"""What leaves out one contender of one case."""


@dataclass(slots=True)
class Results:
    """All that was measured: every value, and for what is missing why it is."""

    raw: Raw = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, case: str, contender: str, values: Values) -> None:
        """Those of one more round."""
        figures = self.raw.setdefault(case, {}).setdefault(contender, {})
        for name, value in values.items():
            figures.setdefault(name, []).append(value)

    def rows(self, cases: Sequence[Case]) -> list[Row]:
        """Of the cases that were measured, in the order of `cases`."""
        rows = []
        for case in cases:
            # In the case's order, which is not the one of the measurements.
            found = self.raw.get(case.name, {})
            measured = {one.name: found[one.name] for one in case.contenders if one.name in found}
            first = case.contenders[0].name
            rows += compare(case.group, case.name, case.load.figures, case.pairs, first, measured)
        return rows


def is_there(needed: str) -> bool:
    """Whether a program is, in fio its nbd engine, and the package uvloop."""
    if needed == UVLOOP:
        return importlib.util.find_spec(UVLOOP) is not None
    return has_nbd_engine() if needed == FIO else shutil.which(needed, path=PATH) is not None


def contenders_here(case: Case, there: Callable[[str], bool], results: Results) -> list[Contender]:
    """Those of `case` that can be measured here; what cannot goes to `results.left_out`."""
    missing = [needed for needed in case.load.needs if not there(needed)]
    if missing:
        what = ["fio with its nbd engine" if needed == FIO else needed for needed in missing]
        results.left_out.append(f"{case.name}: {', '.join(what)} is not here")
        return []
    here = []
    for contender in case.contenders:
        missing = [needed for needed in contender.needs if not there(needed)]
        if missing:
            results.left_out.append(f"{case.name}, {contender.name}: {', '.join(missing)} is not here")
        else:
            here.append(contender)
    if len(here) < 2 and case.pairs.at_most is None:
        results.left_out.append(f"{case.name}: nobody is here to compare with")
        return []
    return here


def turned(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of round `number`, from 0."""
    first = number % max(len(contenders), 1)
    return [*contenders[first:], *contenders[:first]]


def run(cases: Sequence[Case], room: Room, rounds: int, results: Results, say: Say) -> None:
    """Measure every case in every round, into `results`, which is whole after every measurement.

    Who fails is left out from then on: the values of the others stay those of the same rounds.
    """
    there = functools.cache(is_there)
    here = {case.name: contenders_here(case, there, results) for case in cases}
    for line in results.left_out:
        say(f"left out: {line}")
    begun, expected = 0, rounds * sum(map(len, here.values()))
    for number in range(rounds):
        for case in cases:
            for contender in turned(here[case.name], number):
                begun += 1
                what = f"{case.name}, {contender.name}"
                try:
                    values = measure(case, contender, room)
                except FAILURES as error:
                    results.left_out.append(f"{what}, from round {number + 1} on: {error}")
                    here[case.name].remove(contender)
                    say(f"failed: {what}: {error}")
                    continue
                results.add(case.name, contender.name, values)
                say(f"{begun}/{expected}: {what}: {told(case, values)}")


def measure(case: Case, contender: Contender, room: Room) -> Values:
    """One value of each figure.

    Raises:
        one of `FAILURES`: the contender or the load on it failed.
    """
    room.warm()
    disk = room.fragmented if case.fragmented else room.disk
    with contender.running(room, disk) as running:
        values = case.load(running, room)
    if min(values.values()) <= 0:
        raise MeasureFailed(f"did nothing: {told(case, values)}")
    return values


def told(case: Case, values: Values) -> str:
    """One line for who is watching."""
    return ", ".join(
        f"{figure.name} {values[figure.name]:.4g} {figure.unit}".strip() for figure in case.load.figures
    )
