"""fio with its nbd engine: the client of most cases."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.bench.room import MeasureFailed
from tests.support.peers import SYSTEM_PATH

PATH = os.environ.get("PATH", "") + ":" + SYSTEM_PATH
ENVIRONMENT = {**os.environ, "PATH": PATH}
LIMIT_S = 300.0
"""How much longer than it was told to a run may take: one that ends with its work, and slow starts."""
INTERRUPTED = 128


def program(name: str) -> str:
    """Where a program is; its name if it is nowhere."""
    return shutil.which(name, path=PATH) or name


def has_nbd_engine() -> bool:
    """Whether fio is there, and was built with libnbd."""
    if shutil.which("fio", path=PATH) is None:
        return False
    asked = subprocess.run(
        [program("fio"), "--enghelp"], capture_output=True, text=True, timeout=60, check=False
    )
    return "nbd" in asked.stdout.split()


@dataclass(frozen=True, slots=True)
class Side:
    """What one direction of a report says."""

    iops: float
    bytes_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Report:
    """fio's summary of all the connections of one run."""

    read: Side
    write: Side

    @property
    def iops(self) -> float:
        """Requests a second, reads and writes."""
        return self.read.iops + self.write.iops

    @property
    def mib_per_s(self) -> float:
        """Reads and writes."""
        return (self.read.bytes_per_s + self.write.bytes_per_s) / (1 << 20)

    @classmethod
    def parse(cls, output: str) -> Self:
        """From JSON; fio may print a note before it."""
        job = json.loads(output[output.index("{") :])["jobs"][0]
        sides = []
        for name in ("read", "write"):
            side = job[name]
            latency = side["clat_ns"]
            percentiles = latency.get("percentile", {})
            p50, p99 = percentiles.get("50.000000", 0), percentiles.get("99.000000", 0)
            numbers = [side["iops"], side["bw_bytes"], p50 / 1e6, p99 / 1e6, latency["max"] / 1e6]
            sides.append(Side(*map(float, numbers)))
        return cls(*sides)


@dataclass(frozen=True, slots=True)
class Job:
    """`depth` requests of `block_bytes` in flight on each of `connections`; `pattern` is fio's `rw`.

    `seconds` None: until it is through.
    """

    uri: str
    pattern: str
    block_bytes: int
    depth: int
    size: int
    seconds: float | None
    ramp_s: float = 0.0
    connections: int = 1
    options: Sequence[str] = ()

    def command(self) -> list[str]:
        """The command line that prints JSON."""
        # In one process, so that ending it ends all of it.
        command = [
            *(program("fio"), "--output-format=json", "--thread", "--name=bench", "--ioengine=nbd"),
            *(f"--uri={self.uri}", f"--rw={self.pattern}", f"--bs={self.block_bytes}"),
            *(f"--iodepth={self.depth}", f"--numjobs={self.connections}", "--group_reporting"),
            *("--randrepeat=1", "--norandommap", f"--size={self.size}"),
        ]
        if self.seconds is not None:
            command += ["--time_based", f"--runtime={_ms(self.seconds)}", f"--ramp_time={_ms(self.ramp_s)}"]
        return [*command, *self.options]


def replay(uri: str, log: Path, depth: int, seconds: float | None = None) -> list[str]:
    """The command line that does what `log` says once, for `seconds` at most."""
    command = [
        *(program("fio"), "--output-format=json", "--thread", "--name=bench", "--ioengine=nbd"),
        *(f"--uri={uri}", f"--read_iolog={log}", f"--iodepth={depth}", "--bs=4096"),
    ]
    return command if seconds is None else [*command, f"--runtime={_ms(seconds)}"]


@contextmanager
def started(command: Sequence[str], directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a command line of fio in `directory`, where it may leave files, while the block is at work."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=directory, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: "subprocess.Popen[str]", statuses: Sequence[int] = (0,)) -> Report:
    """Wait for its end and read what it says.

    Raises:
        MeasureFailed: it failed, or does not end.
    """
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise MeasureFailed(f"fio has not ended after {LIMIT_S:.0f} s") from None
    if process.returncode not in statuses:
        raise MeasureFailed(f"fio: status {process.returncode}: {output[-1000:]}{errors}")
    return Report.parse(output)


def run(command: Sequence[str], directory: Path) -> Report:
    """Start, and finish."""
    with started(command, directory) as process:
        return finish(process)


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"
