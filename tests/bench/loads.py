"""What contenders are put to: each load is a callable that gives the values of its figures.

`figures` are in the order of the table, the one that expectations are about first. `needs` are the
programs without which a case is left out.
"""

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench import fio
from tests.bench.contenders import Running, call
from tests.bench.figures import Figure
from tests.bench.fio import Job
from tests.bench.room import KIB, MIB, MeasureFailed, Room

TOUCH_DEPTH = 16
POLL_S = 0.01
FIO = "fio"
"""Among `needs`: fio with its nbd engine."""

Values = Mapping[str, float]
"""figure's name -> value"""


class Load(Protocol):
    """One kind of work."""

    @property
    def figures(self) -> Sequence[Figure]:
        """What comes out."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Programs, of which `FIO` is more than a program."""

    def __call__(self, running: Running, room: Room) -> Values:
        """Put `running` to work.

        Raises:
            MeasureFailed: what the load or the contender did failed.
        """


@dataclass(frozen=True, slots=True)
class Transfer:
    """fio for a time: `depth` requests of `block_bytes` in flight on each of `connections`.

    With `touched`, something is written to every cluster before. Without `ramp`, the first requests count.
    """

    pattern: str
    block_bytes: int
    depth: int
    connections: int = 1
    touched: bool = False
    ramp: bool = True
    needs: tuple[str, ...] = (FIO,)

    @property
    def figures(self) -> Sequence[Figure]:
        """Small requests count, of large ones the bytes."""
        return (Figure("IOPS" if self.block_bytes < MIB else "MiB/s"),)

    def job(self, uri: str, room: Room) -> Job:
        """The same as one of fio's jobs."""
        options = ["--rwmixread=70"] if self.pattern == "randrw" else []
        ramp_s = room.ramp_s if self.ramp else 0
        shape = (self.pattern, self.block_bytes, self.depth, room.size)
        return Job(uri, *shape, room.seconds, ramp_s, self.connections, options)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        if self.touched:
            touch(running, room)
        report = fio.run(self.job(running.uri, room).command(), room.directory)
        return {"": report.iops if self.block_bytes < MIB else report.mib_per_s}


@dataclass(frozen=True, slots=True)
class FreshClusters:
    """4 KiB writes, each to a cluster that was not written to before, in a random order."""

    depth: int
    figures: Sequence[Figure] = (Figure("IOPS"),)
    needs: tuple[str, ...] = (FIO,)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        command = fio.replay(running.uri, room.one_write_in(1), self.depth, room.seconds)
        return {"": fio.run(command, room.directory).iops}


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """`nbdinfo --map` of the whole disk, which is the fragmented one."""

    figures: Sequence[Figure] = (Figure("extents/s"),)
    needs: tuple[str, ...] = ("nbdinfo",)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        return {"": room.extents / _seconds_of(["nbdinfo", "--map", running.uri])}


@dataclass(frozen=True, slots=True)
class Pull:
    """A whole snapshot, of which one cluster in eight was saved, by a program: URI and file are appended."""

    command: tuple[str, ...]
    to_file: bool = True
    figures: Sequence[Figure] = (Figure("MiB/s"),)

    @property
    def needs(self) -> tuple[str, ...]:
        """fio writes to the clusters."""
        return (self.command[0], FIO)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        touch(running, room, every=8)
        target = room.directory / "pull.img"
        seconds = _seconds_of([*self.command, running.view_uri, target if self.to_file else "null:"])
        target.unlink(missing_ok=True)
        return {"": room.size / MIB / seconds}


@dataclass(frozen=True, slots=True)
class FullPush:
    """A backup of the whole disk, complete and on stable storage."""

    figures: Sequence[Figure] = (Figure("MiB/s"),)
    needs: tuple[str, ...] = ()

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        return {"": room.size / MIB / _push(running, room)}


@dataclass(frozen=True, slots=True)
class IncrementalPush:
    """A backup of what is dirty, one cluster in a hundred."""

    figures: Sequence[Figure] = (Figure("ms", less_is_better=True),)
    needs: tuple[str, ...] = (FIO,)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        touch(running, room, every=100)
        return {"": 1000 * _push(running, room, incremental=True)}


@dataclass(frozen=True, slots=True)
class PushLatency:
    """How long a client that writes 4 KiB at a time, at random, waits for each reply while a push runs.

    A client that waits long writes little meanwhile, so that its long waits are few, and hide in a p99:
    "moment" is what one would wait that comes at any moment, "client" tells how much was written.
    """

    figures: Sequence[Figure] = (
        Figure("ms", "p99", less_is_better=True),
        Figure("ms", "p50", less_is_better=True),
        Figure("ms", "max", less_is_better=True),
        Figure("ms", "moment p99", less_is_better=True),
        Figure("IOPS", "client"),
        Figure("MiB/s", "push"),
    )
    needs: tuple[str, ...] = (FIO,)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        log = room.directory / "bench_lat.1.log"
        options = ["--write_lat_log=bench", "--log_unix_epoch=1", "--disable_clat=1", "--disable_slat=1"]
        job = Job(running.uri, "randwrite", 4 * KIB, 1, room.size, fio.LIMIT_S, options=options)
        written = room.disk.stat().st_mtime_ns
        with fio.started(job.command(), room.directory) as process:
            _wait_for_write(room.disk, written, process)
            time.sleep(room.ramp_s)
            began = time.time()
            seconds = _push(running, room)
            process.send_signal(signal.SIGINT)
            fio.finish(process, (0, fio.INTERRUPTED))
        latencies = sorted(latencies_ms(log, began, began + seconds))
        log.unlink()
        if not latencies:
            raise MeasureFailed("the client wrote nothing while the push ran")
        count = len(latencies)
        p50, p99 = latencies[count // 2], latencies[count * 99 // 100]
        rates = {"client": count / seconds, "push": room.size / MIB / seconds}
        return {"p99": p99, "p50": p50, "max": latencies[-1], "moment p99": moment_p99(latencies), **rates}


@dataclass(frozen=True, slots=True)
class Fairness:
    """A client with one 4 KiB request in flight, beside one with 64 of 1 MiB; `kind` is "read" or "write"."""

    kind: str
    figures: Sequence[Figure] = (
        Figure("ms", "p99", less_is_better=True),
        Figure("ms", "p50", less_is_better=True),
        Figure("MiB/s", "large"),
    )
    needs: tuple[str, ...] = (FIO,)

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        shapes = ((f"rand{self.kind}", 4 * KIB, 1), (self.kind, MIB, 64))
        jobs = [Job(running.uri, *shape, room.size, room.seconds, room.ramp_s) for shape in shapes]
        with ExitStack() as stack:
            processes = [stack.enter_context(fio.started(job.command(), room.directory)) for job in jobs]
            small, large = [fio.finish(process) for process in processes]
        side = small.read if self.kind == "read" else small.write
        return {"p99": side.p99_ms, "p50": side.p50_ms, "large": large.mib_per_s}


@dataclass(frozen=True, slots=True)
class Start:
    """From the start of the program to the first client's greeting, or to its being announced."""

    figures: Sequence[Figure] = (Figure("s", less_is_better=True),)
    needs: tuple[str, ...] = ()

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        return {"": running.start_s}


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory in MB of 10^6 bytes; with `load`, the most that there was meanwhile."""

    load: Transfer | None = None
    figures: Sequence[Figure] = (Figure("MB", less_is_better=True),)

    @property
    def needs(self) -> tuple[str, ...]:
        """Those of the load."""
        return self.load.needs if self.load else ()

    def __call__(self, running: Running, room: Room) -> Values:
        """As the protocol has it."""
        if self.load is not None:
            self.load(running, room)
        field = "VmHWM:" if self.load else "VmRSS:"
        for line in Path(f"/proc/{running.pid}/status").read_text().splitlines():
            if line.startswith(field):
                return {"": int(line.split()[1]) * KIB / 1e6}
        raise MeasureFailed(f"no {field} of process {running.pid}")


def touch(running: Running, room: Room, every: int = 1) -> None:
    """Write 4 KiB to one cluster of every `every`."""
    fio.run(fio.replay(running.uri, room.one_write_in(every), TOUCH_DEPTH), room.directory)


def latencies_ms(log: Path, began: float, ended: float) -> list[float]:
    """Those of fio's log, in seconds since 1970, that ended in a time."""
    latencies = []
    for line in log.read_text().splitlines():
        at_ms, latency_ns, *_ = line.split(",")
        if began * 1000 <= int(at_ms) <= ended * 1000:
            latencies.append(int(latency_ns) / 1e6)
    return latencies


def _wait_for_write(disk: Path, written_ns: int, process: "subprocess.Popen[str]") -> None:
    """Return when `disk`, last written to at `written_ns`, is written to again, by fio's `process`."""
    while disk.stat().st_mtime_ns == written_ns:
        if process.poll() is not None:
            fio.finish(process)
            raise MeasureFailed("fio ended without a write")
        time.sleep(POLL_S)


def moment_p99(latencies: Sequence[float]) -> float:
    """How long it is from any moment to the end of the request that is under way then: p99 of all moments.

    `latencies`, sorted, are of requests one after the other, with no pause between.
    """
    late = sum(latencies) / 100
    longer = 0.0
    for count, latency in enumerate(reversed(latencies), 1):
        # So much of all time is more than `latency` before the end of its request:
        if longer - (count - 1) * latency > late:
            return (longer - late) / (count - 1)
        longer += latency
    return max(0.0, (longer - late) / len(latencies))


def _push(running: Running, room: Room, incremental: bool = False) -> float:
    """Seconds of a push; its target is removed."""
    target = room.directory / "push.img"
    assert running.push is not None
    try:
        started = time.perf_counter()
        running.push(target, incremental)
        return time.perf_counter() - started
    finally:
        target.unlink(missing_ok=True)


def _seconds_of(command: Sequence[str | Path]) -> float:
    started = time.perf_counter()
    call(command)
    return time.perf_counter() - started
