"""`python -m tests.bench`; see README.md beside it."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.bench import report
from tests.bench.cases import GROUPS, Case, select
from tests.bench.machine import describe
from tests.bench.picture import draw
from tests.bench.room import MIB, PIECES, room_in
from tests.bench.runner import Results, run

QUICK_ROUNDS, QUICK_SECONDS, QUICK_SIZE_MIB, QUICK_RAMP_S = 1, 0.2, 64, 0.2
INTERRUPTED = 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Speed, side by side.")
    parser.add_argument("--list", action="store_true", help="show the cases, and measure nothing")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a case, a group, or a pattern with *; may be repeated",
    )
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument(
        "--seconds", type=float, help="of each load that runs for a time, after 1 s of ramp; default 3"
    )
    parser.add_argument("--size-mib", type=int, help="of the disk; default 2048")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"only try whether all works: {QUICK_ROUNDS} round, {QUICK_SECONDS} s, {QUICK_SIZE_MIB} MiB",
    )
    parser.add_argument(
        "--written-in",
        choices=list(PIECES),
        default="4K",
        help="pieces that the disk is written in; default 4K",
    )
    parser.add_argument("--directory", type=Path, help="where the disk, scratch and the copies are")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write results.md, results.svg and results.json there"
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="JSON", help="measure nothing: report an earlier run's results"
    )
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    chosen.rounds = chosen.rounds or (QUICK_ROUNDS if quick else 5)
    chosen.seconds = chosen.seconds or (QUICK_SECONDS if quick else 3.0)
    chosen.size_mib = chosen.size_mib or (QUICK_SIZE_MIB if quick else 2048)
    return chosen


def listing(cases: Sequence[Case]) -> str:
    """A line for each case."""
    lines = []
    for case in cases:
        contenders = ", ".join(contender.name for contender in case.contenders)
        lines.append(f"{case.group:12} {case.name:20} {case.what}: {contenders}")
    return "\n".join([*lines, f"groups: {', '.join(GROUPS)}"])


def measure(chosen: argparse.Namespace, cases: Sequence[Case], results: Results) -> dict[str, str]:
    """Measure into `results`; what the machine is."""
    ramp_s = QUICK_RAMP_S if chosen.quick else 1.0
    piece = PIECES[chosen.written_in]
    with room_in(chosen.directory, chosen.size_mib * MIB, chosen.seconds, ramp_s, piece) as room:
        about = describe(room.directory)
        disk = f"a disk of {chosen.size_mib} MiB written in {chosen.written_in}"
        about["bench"] = f"{chosen.rounds} rounds of {chosen.seconds:g} s, {disk}"
        try:
            run(cases, room, chosen.rounds, results, lambda line: print(line, file=sys.stderr, flush=True))
        except KeyboardInterrupt:
            about["interrupted"] = "yes"
    return about


def main() -> None:
    """Measure, and report what was measured: also when interrupted."""
    chosen = parse(sys.argv[1:])
    cases = select(chosen.only)
    if chosen.list:
        print(listing(cases))
        return
    if chosen.redraw is not None:
        about, results = report.load(chosen.redraw)
    else:
        signal.signal(signal.SIGTERM, _interrupt)
        results = Results()
        try:
            about = measure(chosen, cases, results)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
    rows = results.rows(cases)
    text = report.table(rows, about, results)
    print(text)
    if chosen.output is not None:
        chosen.output.mkdir(parents=True, exist_ok=True)
        (chosen.output / "results.md").write_text(text)
        (chosen.output / "results.svg").write_text(draw(rows, "nbdbackup beside its peers"))
        report.dump(chosen.output / "results.json", about, results)
    if "interrupted" in about and chosen.redraw is None:
        raise SystemExit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
