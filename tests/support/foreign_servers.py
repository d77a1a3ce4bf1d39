"""NBD servers that others wrote, as processes of their own, to be started, killed and started again.

    with ForeignServer(nbdkit("memory", "64M")) as server:
        device = await NbdDevice.open(server.uri())

Every wait has a limit. What a server listens on is a Unix socket in a directory of its own below /tmp.
"""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import peers

START_TIMEOUT_S = 30.0
POLL_S = 0.01

MakeCommand = Callable[[Path], Sequence[str]]
"""The command that serves on the Unix socket at a path."""


def nbdkit(*arguments: str | Path) -> MakeCommand:
    """nbdkit with `arguments`: filters, plugin, parameters."""
    program = peers.require("nbdkit")
    return lambda path: [program, "-f", "-U", str(path), *map(str, arguments)]


def qemu_nbd(image: Path, *arguments: str, format: str = "raw") -> MakeCommand:
    """qemu-nbd of `image`, as the export "disk"; `-t` is understood."""
    program = peers.require("qemu-nbd")
    return lambda path: [program, "-t", "-f", format, "-x", "disk", "-k", str(path), *arguments, str(image)]


class ForeignServer:
    """One server; a context manager that starts it and ends it. Set once: `socket_path`."""

    def __init__(self, command: MakeCommand) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nbdbackup-peer-"))
        self.socket_path = self.directory / "s"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def uri(self, export: str = "") -> str:
        """Of one of its exports."""
        return f"nbd+unix:///{export}?socket={self.socket_path}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, which has been started."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start it, again perhaps, and wait until it answers."""
        self.socket_path.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command(self.socket_path), stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, f"ended with status {self._process.returncode}"
            assert time.monotonic() < deadline, "does not answer"
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(START_TIMEOUT_S)
            try:
                probe.connect(str(self.socket_path))
                return bool(probe.recv(1))
            except OSError:
                return False

    def kill(self) -> None:
        """`kill -9`, and collect it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_TIMEOUT_S)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
