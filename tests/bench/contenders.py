"""Who is compared: our server and the field's, each in one set-up, and programs that copy with no server.

A contender's `running(room, disk)` is a context manager: it starts the contender over `disk`, and gives
what a load needs to put it to work. Every server starts anew for every measurement, with nothing left of
the one before.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.fio import ENVIRONMENT, program
from tests.bench.qmp import execute, run_job
from tests.bench.room import MeasureFailed, Room
from tests.support.certificates import Pki
from tests.support.server import Server

START_LIMIT_S = 30.0
STOP_LIMIT_S = 60.0
COPY_LIMIT_S = 900.0
POLL_S = 0.001
OURS = "nbdbackup"
UNIX, TCP, TLS = "unix", "tcp", "tls"
"""Transports; TLS is over TCP."""
BITMAP = "b0"
UVLOOP = "uvloop"
"""Among `needs`: not a program, but a package."""

Push = Callable[[Path, bool], None]
"""Copy the disk to a new file, on stable storage when it returns; or, if True, what `BITMAP` says."""


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that was started. What it does not have is empty.

    `uri` and `view_uri` are the exports of the disk and of its snapshot; `start_s` is how long it
    took from the start to the first client's greeting, or to being announced.
    """

    uri: str = ""
    view_uri: str = ""
    pid: int = 0
    start_s: float = 0.0
    push: Push | None = None


class Contender(Protocol):
    """One side of a comparison; `needs` are the programs without which it is left out."""

    @property
    def name(self) -> str:
        """In the table."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Programs."""

    def running(self, room: Room, disk: Path) -> AbstractContextManager[Running]:
        """Start it, and end it.

        Raises:
            MeasureFailed: it did not start.
        """


@dataclass(frozen=True, slots=True)
class Ours:
    """`nbdbackup serve`, with a bitmap and a snapshot as `bitmap` and `snapshot` have their options.

    None: there is none; (): there is one, with the defaults. `by_command`: push with `nbdbackup backup`, and
    not over QMP. `without_uvloop`: on the standard library's event loop, also where uvloop is installed.
    """

    name: str = OURS
    transport: str = UNIX
    options: tuple[str, ...] = ()
    bitmap: tuple[str, ...] | None = None
    snapshot: tuple[str, ...] | None = None
    by_command: bool = False
    without_uvloop: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Without uvloop it is the same as with it."""
        return (UVLOOP,) if self.without_uvloop else ()

    @contextmanager
    def running(self, room: Room, disk: Path) -> Iterator[Running]:
        """As the protocol has it."""
        unix = self.transport == UNIX
        options = [*self.options]
        if self.transport == TLS:
            options += ["--tls-creds", str(server_certificates(room.directory))]
        with room.place() as place:
            server = Server(
                {"disk": disk},
                options,
                unix=unix,
                tcp=not unix,
                state_dir=place / "state",
                environment=_installed(room, _hiding_uvloop(place) if self.without_uvloop else {}),
            )
            started = time.perf_counter()
            with server:
                start_s = time.perf_counter() - started
                if self.bitmap is not None:
                    server.cli("bitmap", "add", "disk", BITMAP, *self.bitmap)
                if self.snapshot is not None:
                    server.cli("snapshot", "create", "disk", "--name", "s1", *self.snapshot)
                uri, view = server.uri("disk"), server.uri("disk@s1")
                if self.transport == TLS:
                    uri = uri.replace("nbd:", "nbds:")
                push = functools.partial(_push_by_command if self.by_command else _push_by_qmp, server)
                yield Running(uri, view, server.pid, start_s, push)


def _installed(room: Room, environment: Mapping[str, str]) -> dict[str, str]:
    """With compiled modules, as an installed program has them."""
    bytecode = room.directory / "bytecode"
    changes = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode), **environment}
    if not bytecode.exists():
        command = [sys.executable, "-c", "import nbdbackup.cli.serve"]
        subprocess.run(command, check=True, timeout=COPY_LIMIT_S, env={**os.environ, **changes})
    return changes


def _hiding_uvloop(place: Path) -> dict[str, str]:
    """An environment in which Python cannot import uvloop."""
    (place / "uvloop.py").write_text('raise ImportError("hidden by the bench")\n')
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _push_by_command(server: Server, target: Path, incremental: bool) -> None:
    options = ["--sync", "incremental", "--bitmap", BITMAP] if incremental else []
    server.cli("backup", "disk", str(target), *options, timeout_s=COPY_LIMIT_S)


def _push_by_qmp(server: Server, target: Path, incremental: bool) -> None:
    sync = {"sync": "incremental", "bitmap": BITMAP} if incremental else {"sync": "full"}
    run_job(server.control, ("x-nbdbackup-backup", {"node": "disk", "target": str(target), **sync}))


@dataclass(frozen=True, slots=True)
class QemuNbd:
    """qemu-nbd as it is used most, with no limit to its clients."""

    transport: str = UNIX
    name: str = "qemu-nbd"
    needs: tuple[str, ...] = ("qemu-nbd",)

    @contextmanager
    def running(self, room: Room, disk: Path) -> Iterator[Running]:
        """As the protocol has it."""
        command = [
            *("qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-e", "0"),
            *("--cache=writeback", "--aio=threads", "--discard=unmap"),
        ]
        if self.transport == TLS:
            credentials = server_certificates(room.directory)
            keys = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir={credentials}"
            command += ["--object", keys, "--tls-creds", "tls"]
        with _listening(self.transport) as address:
            listen = (
                ["-b", "127.0.0.1", "-p", str(address.port)]
                if address.port
                else ["-k", str(address.socket_path)]
            )
            with _process([*command, *listen, str(disk)], address) as (pid, start_s):
                yield Running(address.uri("disk"), pid=pid, start_s=start_s)


@dataclass(frozen=True, slots=True)
class Nbdkit:
    """nbdkit's file plugin with its defaults."""

    transport: str = UNIX
    name: str = "nbdkit"
    needs: tuple[str, ...] = ("nbdkit",)

    @contextmanager
    def running(self, room: Room, disk: Path) -> Iterator[Running]:
        """As the protocol has it."""
        command = ["nbdkit", "-f", "-e", "disk"]
        if self.transport == TLS:
            command += ["--tls=require", f"--tls-certificates={server_certificates(room.directory)}"]
        with _listening(self.transport) as address:
            listen = (
                ["-i", "127.0.0.1", "-p", str(address.port)]
                if address.port
                else ["-U", str(address.socket_path)]
            )
            with _process([*command, *listen, "file", str(disk)], address) as (pid, start_s):
                yield Running(address.uri("disk"), pid=pid, start_s=start_s)


@dataclass(frozen=True, slots=True)
class StorageDaemon:
    """qemu-storage-daemon; with `snapshot`, its copy-before-write over the disk, and snapshot-access; with
    `bitmap`, a dirty bitmap.

    `perf`: what `x-perf` of its blockdev-backup says, if not its defaults.
    """

    snapshot: bool = False
    bitmap: bool = False
    perf: tuple[tuple[str, bool | int], ...] = ()
    name: str = "qemu-storage-daemon"
    needs: tuple[str, ...] = ("qemu-storage-daemon",)

    @contextmanager
    def running(self, room: Room, disk: Path) -> Iterator[Running]:
        """As the protocol has it."""
        with room.place() as place, _listening(UNIX) as address:
            control = address.directory / "qmp"
            command = [
                *("qemu-storage-daemon", "--chardev", f"socket,id=qmp,path={control},server=on,wait=off"),
                *("--monitor", "chardev=qmp", *self._graph(place, disk)),
                *("--nbd-server", f"addr.type=unix,addr.path={address.socket_path}", *self._exports()),
            ]
            with _process(command, address) as (pid, start_s):
                if self.bitmap:
                    execute(control, [("block-dirty-bitmap-add", {"node": "disk", "name": BITMAP})])
                push = functools.partial(self._push, control, disk.stat().st_size)
                yield Running(address.uri("disk"), address.uri("disk@s1"), pid, start_s, push)

    def _graph(self, place: Path, disk: Path) -> list[str]:
        nodes = [f"driver=file,node-name=file,discard=unmap,filename={disk}"]
        if self.snapshot:
            scratch = place / "scratch.img"
            with scratch.open("wb") as file:
                file.truncate(disk.stat().st_size)
            nodes += [
                f"driver=file,node-name=scratch,discard=unmap,filename={scratch}",
                "driver=copy-before-write,node-name=disk,discard=unmap,file=file,target=scratch",
                "driver=snapshot-access,node-name=view,file=disk",
            ]
        else:
            nodes.append("driver=raw,node-name=disk,discard=unmap,file=file")
        return [word for node in nodes for word in ("--blockdev", node)]

    def _exports(self) -> list[str]:
        exports = ["--export", "type=nbd,id=live,node-name=disk,name=disk,writable=on"]
        return (
            [*exports, "--export", "type=nbd,id=view,node-name=view,name=disk@s1"]
            if self.snapshot
            else exports
        )

    def _push(self, control: Path, size: int, target: Path, incremental: bool) -> None:
        with target.open("wb") as file:
            file.truncate(size)
        job: dict[str, object] = {"job-id": "push", "device": "disk", "target": "target"}
        job |= {"sync": "incremental", "bitmap": BITMAP} if incremental else {"sync": "full"}
        if self.perf:
            job["x-perf"] = dict(self.perf)
        node = {"driver": "file", "node-name": "target", "filename": str(target)}
        execute(control, [("blockdev-add", node)])
        run_job(control, ("blockdev-backup", job))
        execute(control, [("blockdev-del", {"node-name": "target"})])
        sync(target)


@dataclass(frozen=True, slots=True)
class Program:
    """A program that copies one file to another, and that knows nothing of writers meanwhile."""

    name: str
    command: tuple[str, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The program."""
        return self.command[:1]

    @contextmanager
    def running(self, room: Room, disk: Path) -> Iterator[Running]:
        """As the protocol has it."""

        def push(target: Path, incremental: bool) -> None:
            assert not incremental
            call([*self.command, disk, target])
            sync(target)

        yield Running(push=push)


CP = Program("cp", ("cp", "--reflink=never", "--sparse=never"))
QEMU_IMG = Program("qemu-img convert", ("qemu-img", "convert", "-f", "raw", "-O", "raw"))


def call(command: Sequence[str | Path]) -> None:
    """Run a program that must succeed.

    Raises:
        MeasureFailed: it did not.
    """
    words = [program(str(command[0])), *map(str, command[1:])]
    done = subprocess.run(
        words,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=COPY_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise MeasureFailed(f"{' '.join(words)}: status {done.returncode}: {done.stderr.strip()}")


def sync(path: Path) -> None:
    """Bring a file to stable storage."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@functools.cache
def server_certificates(directory: Path) -> Path:
    """A server's certificates, in a directory below `directory`."""
    return Pki(directory).server()


class _Address:
    """Where a peer listens; `port` 0: on a Unix socket."""

    def __init__(self, directory: Path, transport: str) -> None:
        self.directory = directory
        self.transport = transport
        self.socket_path = directory / "s"
        self.port = 0
        if transport != UNIX:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]

    def uri(self, export: str) -> str:
        if self.transport == UNIX:
            return f"nbd+unix:///{export}?socket={self.socket_path}"
        return f"{'nbds' if self.transport == TLS else 'nbd'}://127.0.0.1:{self.port}/{export}"

    def answers(self) -> bool:
        """Whether a client is greeted."""
        family = socket.AF_INET if self.port else socket.AF_UNIX
        with socket.socket(family) as probe:
            probe.settimeout(START_LIMIT_S)
            try:
                probe.connect(("127.0.0.1", self.port) if self.port else str(self.socket_path))
                return bool(probe.recv(1))
            except OSError:
                return False


@contextmanager
def _listening(transport: str) -> Iterator[_Address]:
    """An address; sockets are in the system's temporary directory, since their paths must be short."""
    with tempfile.TemporaryDirectory(prefix="nbdbackup-bench-") as directory:
        yield _Address(Path(directory), transport)


@contextmanager
def _process(command: Sequence[str], address: _Address) -> Iterator[tuple[int, float]]:
    """A server; its process id, and how long it took to greet a client."""
    log_path = address.directory / "log"
    started = time.perf_counter()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        while not address.answers():
            if process.poll() is not None or time.perf_counter() - started > START_LIMIT_S:
                raise MeasureFailed(
                    f"{command[0]} did not start: {log_path.read_text(errors='replace').strip()}"
                )
            time.sleep(POLL_S)
        yield process.pid, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        finally:
            process.kill()
            process.wait()
