"""On what, with what and when: what a figure means nothing without."""

import datetime
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

from tests.bench.fio import ENVIRONMENT, program

PROGRAMS = ("fio", "qemu-nbd", "qemu-storage-daemon", "qemu-img", "nbdkit", "nbdcopy", "nbdinfo")
LIMIT_S = 30.0


def describe(directory: Path) -> dict[str, str]:
    """The machine, the file system of `directory`, versions, and the load that others make now."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _from_proc("cpuinfo", "model name"),
        "processors": str(len(os.sched_getaffinity(0))),
        "memory": _from_proc("meminfo", "MemTotal"),
        "kernel": platform.release(),
        "file system": _first_line("stat", "-f", "-c", "%T", str(directory)),
        "load of others": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "uvloop": "installed" if importlib.util.find_spec("uvloop") else "not installed",
        "nbdbackup": _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        **{name: _first_line(name, "--version") for name in PROGRAMS},
    }


def _from_proc(file: str, field: str) -> str:
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return "unknown"


def _first_line(name: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program(name), *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "not here"
    return next(iter(done.stdout.splitlines()), "unknown")
