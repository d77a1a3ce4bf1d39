"""Debian 13's programs, which know extended headers, run beside this system's own.

`fixtures/newer-peers` unpacks them; nothing of them is installed. Each is run through its own dynamic
linker with its own libraries.
"""

import functools
import os
import subprocess
from pathlib import Path

from tests.support.peers import unavailable

REPOSITORY = Path(__file__).parents[2]
UNPACK_TIMEOUT_S = 1200.0


@functools.cache
def _root() -> Path | None:
    if os.environ.get("NBDBACKUP_NO_PEERS") is None:
        command = [str(REPOSITORY / "fixtures" / "newer-peers")]
    else:
        command = [str(REPOSITORY / "fixtures" / "newer-peers"), "--check"]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=UNPACK_TIMEOUT_S,
        check=False,
    )
    return Path(result.stdout.strip()) if result.returncode == 0 else None


def newer(program: str) -> list[str]:
    """The words that run Debian 13's `program`; its arguments go behind."""
    root = _root()
    if root is None:
        unavailable("Debian 13's programs cannot be had (fixtures/newer-peers)")
    (linker,) = root.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*")
    return [str(linker), "--library-path", str(linker.parent), str(root / "usr" / "bin" / program)]


def newer_libnbd_python() -> tuple[list[str], dict[str, str]]:
    """The words that run Debian 13's Python, and the environment in which it finds its `nbd` module."""
    words = newer("python3")
    root = _root()
    assert root is not None
    return words, {"PATH": os.environ["PATH"], "PYTHONHOME": str(root / "usr")}
