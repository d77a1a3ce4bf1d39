"""The servers that are compared, each on a Unix socket over the same file."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.peers import SYSTEM_PATH
from tests.support.server import Server

START_TIMEOUT_S = 30.0
OURS = "nbdbackup"
NAMES = (OURS, "qemu-nbd", "nbdkit")
ENVIRONMENT = {**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SYSTEM_PATH}


@contextmanager
def running(name: str, disk: Path) -> Iterator[str]:
    """Serve `disk` with the server `name`; its URI."""
    if name == OURS:
        with Server({"disk": disk}, tcp=False) as server:
            yield server.uri("disk")
        return
    with tempfile.TemporaryDirectory(prefix="nbdbackup-bench-") as directory:
        socket = Path(directory) / "nbd.sock"
        command = {
            "qemu-nbd": [
                *("qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-e", "16", "-k", str(socket)),
                *("--cache=writeback", "--aio=threads", "--discard=unmap", str(disk)),
            ],
            "nbdkit": ["nbdkit", "-f", "-U", str(socket), "-e", "disk", "file", str(disk)],
        }[name]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start")
                time.sleep(0.02)
            yield f"nbd+unix:///disk?socket={socket}"
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)
