"""What is measured: fio's jobs, and a push against cp."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.servers import ENVIRONMENT
from tests.support.server import Server

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """One job of fio: `pattern` is fio's `rw`; `depth` requests of `block_bytes` in flight."""

    name: str
    pattern: str
    block_bytes: int
    depth: int
    unit: str


WORKLOADS = (
    Workload("randread-4k-d1", "randread", 4096, 1, "IOPS"),
    Workload("randread-4k-d16", "randread", 4096, 16, "IOPS"),
    Workload("randwrite-4k-d1", "randwrite", 4096, 1, "IOPS"),
    Workload("randwrite-4k-d16", "randwrite", 4096, 16, "IOPS"),
    Workload("read-1m-d8", "read", MIB, 8, "MiB/s"),
    Workload("write-1m-d8", "write", MIB, 8, "MiB/s"),
)


def measure(workload: Workload, uri: str, size: int, seconds: float) -> float:
    """Run one job; its rate in the workload's unit."""
    command = [
        *("fio", "--output-format=json", f"--name={workload.name}", "--ioengine=nbd", f"--uri={uri}"),
        *(f"--rw={workload.pattern}", f"--bs={workload.block_bytes}", f"--iodepth={workload.depth}"),
        *(f"--size={size}", "--time_based", f"--runtime={seconds}", "--ramp_time=1", "--randrepeat=1"),
        *("--norandommap", "--group_reporting"),
    ]
    finished = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    if finished.returncode != 0:
        raise SystemExit(f"fio failed on {uri}: {finished.stdout[-2000:]}{finished.stderr}")
    # fio may print a note before the JSON.
    report = json.loads(finished.stdout[finished.stdout.index("{") :])["jobs"][0]
    side = report["read" if "read" in workload.pattern else "write"]
    return float(side["iops"]) if workload.unit == "IOPS" else float(side["bw_bytes"]) / MIB


def warm(disk: Path) -> None:
    """Bring the whole file into the page cache, and its dirty pages out, so that nobody pays for another."""
    with disk.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        buffer = bytearray(4 * MIB)
        while file.readinto(buffer):
            pass


def measure_push(disk: Path, target: Path) -> float:
    """MiB/s of a backup to a new raw file, complete and on stable storage."""
    with Server({"disk": disk}, tcp=False) as server:
        started = time.monotonic()
        server.cli("backup", "disk", str(target), timeout_s=600)
        seconds = time.monotonic() - started
    target.unlink()
    return disk.stat().st_size / MIB / seconds


def measure_cp(disk: Path, target: Path) -> float:
    """MiB/s of cp to a new file and of bringing it to stable storage."""
    started = time.monotonic()
    subprocess.run(["cp", "--reflink=never", "--sparse=never", disk, target], check=True, timeout=600)
    subprocess.run(["sync", target], check=True, timeout=600)
    seconds = time.monotonic() - started
    target.unlink()
    return disk.stat().st_size / MIB / seconds
