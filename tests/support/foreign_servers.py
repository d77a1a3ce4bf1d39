"""NBD servers that others wrote, as processes of their own, to be started, killed and started again.

    with ForeignServer(nbdkit("memory", "64M")) as server:
        device = await NbdDevice.open(server.uri())

Every wait has a limit. What a server listens on is a Unix socket in a directory of its own below /tmp.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import peers
from tests.support.newer_peers import newer
from tests.support.server import COMMAND

START_TIMEOUT_S = 30.0
POLL_S = 0.01
PID_FILE = "pid"
"""Beside the socket, of a server that can only run in the background."""

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


def newer_nbdkit(*arguments: str | Path, plugin: str, filters: Sequence[str] = ()) -> MakeCommand:
    """Debian 13's nbdkit with `arguments`: options, and the parameters of `plugin` and `filters`."""
    words = newer("nbdkit")
    modules = Path(words[2]) / "nbdkit"
    named = [f"--filter={modules}/filters/nbdkit-{name}-filter.so" for name in filters]
    options = [*words, "-f", *named]
    module = f"{modules}/plugins/nbdkit-{plugin}-plugin.so"
    dashed = [str(argument) for argument in arguments if str(argument).startswith("-")]
    rest = [str(argument) for argument in arguments if not str(argument).startswith("-")]
    return lambda path: [*options, *dashed, "-U", str(path), module, *rest]


def newer_qemu_nbd(image: Path, *arguments: str) -> MakeCommand:
    """Debian 13's qemu-nbd of the raw `image`, as the export "disk"."""
    words = newer("qemu-nbd")
    return lambda path: [*words, "-t", "-f", "raw", "-x", "disk", "-k", str(path), *arguments, str(image)]


def qemu_storage_daemon(image: Path, *objects: str, words: Sequence[str] | None = None) -> MakeCommand:
    """QEMU's daemon with the raw `image` as the export "disk"; `words` run it, by default this system's.

    `objects` are `--object` and their values; one called "tls" is used for TLS.
    """
    program = [peers.require("qemu-storage-daemon")] if words is None else list(words)
    node = f"driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={image}"
    export = "type=nbd,id=e,node-name=disk,name=disk,writable=on"
    tls = ",tls-creds=tls" if objects else ""

    def command(path: Path) -> list[str]:
        server = f"addr.type=unix,addr.path={path}{tls}"
        return [*program, *objects, "--blockdev", node, "--nbd-server", server, "--export", export]

    return command


def qemu_fleecing(image: Path, scratch: Path, words: Sequence[str]) -> MakeCommand:
    """QEMU's daemon, which `words` run: the raw `image` is the export "disk", its view "disk@s1"."""
    nodes = [
        f"driver=file,node-name=file,discard=unmap,filename={image}",
        f"driver=file,node-name=scratch,discard=unmap,filename={scratch}",
        "driver=copy-before-write,node-name=cbw,discard=unmap,file=file,target=scratch",
        "driver=snapshot-access,node-name=view,file=cbw",
    ]
    exports = [
        "type=nbd,id=live,node-name=cbw,name=disk,writable=on",
        "type=nbd,id=view,node-name=view,name=disk@s1",
    ]

    def command(path: Path) -> list[str]:
        graph = [word for node in nodes for word in ("--blockdev", node)]
        offers = [word for export in exports for word in ("--export", export)]
        return [*words, *graph, "--nbd-server", f"addr.type=unix,addr.path={path}", *offers]

    return command


def own_server(image: Path, *arguments: str) -> MakeCommand:
    """Our own server of `image`, as the export "disk"."""

    def command(path: Path) -> list[str]:
        beside = path.parent
        places = ["-k", str(path), "--control", f"{beside}/c", "--state-dir", f"{beside}/state"]
        return [*COMMAND, "serve", *places, *arguments, f"disk={image}"]

    return command


def nbd_server(image: Path, certificates: Path | None = None) -> MakeCommand:
    """The reference implementation's server of `image`, as the export "disk"; `certificates`: TLS alone."""
    program = peers.require("nbd-server")
    tls = (
        f"force_tls = true\ncertfile = {certificates}/server-cert.pem\n"
        f"keyfile = {certificates}/server-key.pem\ncacertfile = {certificates}/ca-cert.pem\n"
    )

    def command(path: Path) -> list[str]:
        config = path.with_name("config")
        config.write_text(
            f"[generic]\nallowlist = true\nunixsock = {path}\n{tls if certificates else ''}"
            f"[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
        )
        return [program, "-C", str(config), "-p", str(path.with_name(PID_FILE))]

    return command


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
            assert self._process.poll() in (None, 0), f"ended with status {self._process.returncode}"
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
        pid_file = self.socket_path.with_name(PID_FILE)
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
            pid_file.unlink()

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
