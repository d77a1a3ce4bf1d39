"""`python -m tests.bench`; see README.md beside it."""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.bench.servers import NAMES, OURS, running
from tests.bench.workloads import MIB, WORKLOADS, measure, measure_cp, measure_push, warm
from tests.support.disks import make_disk

Rates = dict[str, dict[str, list[float]]]
"""workload -> contender -> one rate a round"""

CP = "cp"
PUSH = "push"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Speed, side by side.")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement, after 1 s of ramp")
    parser.add_argument("--size-mib", type=int, default=2048, help="of the disk; default 2048")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this workload; may be repeated")
    parser.add_argument("--directory", type=Path, help="where the disk and the copies are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw figures")
    return parser.parse_args()


def _measure_all(disk: Path, chosen: set[str], rounds: int, seconds: float) -> Rates:
    rates: Rates = defaultdict(lambda: defaultdict(list))
    size = disk.stat().st_size
    for number in range(1, rounds + 1):
        for workload in WORKLOADS:
            if workload.name not in chosen:
                continue
            for name in NAMES:
                warm(disk)
                with running(name, disk) as uri:
                    rate = measure(workload, uri, size, seconds)
                rates[workload.name][name].append(rate)
                print(f"round {number}: {workload.name} {name}: {rate:.0f} {workload.unit}", file=sys.stderr)
        if PUSH in chosen:
            for name, measured in ((OURS, measure_push), (CP, measure_cp)):
                warm(disk)
                rate = measured(disk, disk.with_name("copy.img"))
                rates[PUSH][name].append(rate)
                print(f"round {number}: push {name}: {rate:.0f} MiB/s", file=sys.stderr)
    return rates


def _table(rates: Rates) -> str:
    units = {workload.name: workload.unit for workload in WORKLOADS}
    lines = [
        "| workload | ours | spread | qemu-nbd | ours/qemu-nbd | nbdkit | ours/nbdkit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, contenders in rates.items():
        medians = {contender: statistics.median(values) for contender, values in contenders.items()}
        ours, values = medians[OURS], contenders[OURS]
        spread = (max(values) - min(values)) / ours
        cells = [name, f"{ours:.0f} {units.get(name, 'MiB/s')}", f"{spread:.0%}"]
        if name == PUSH:
            cells += [f"cp: {medians[CP]:.0f}", f"ours/cp: {ours / medians[CP]:.2f}", "", ""]
        else:
            for peer in NAMES[1:]:
                cells += [f"{medians[peer]:.0f}", f"{ours / medians[peer]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the figures."""
    arguments = _arguments()
    names = [workload.name for workload in WORKLOADS] + [PUSH]
    chosen = set(arguments.only or names)
    if unknown := chosen - set(names):
        raise SystemExit(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="nbdbackup-bench-", dir=arguments.directory) as directory:
        disk = make_disk(Path(directory) / "disk.img", arguments.size_mib * MIB)
        rates = _measure_all(disk, chosen, arguments.rounds, arguments.seconds)
    print(_table(rates))
    if arguments.json:
        arguments.json.write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main()
