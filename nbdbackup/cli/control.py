"""Talking to a running server: one QMP connection over its control socket.

The protocol is `qemu.qmp`'s business. This module bounds the waits, turns failures into
one clear line, and gives results as typed values (`replies.py`).
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import StateError

from nbdbackup.cli.interrupts import is_ignored
from nbdbackup.errors import NbdBackupError, NotFoundError, UsageError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
DISCONNECT_TIMEOUT_S = 2
SOCKET_PATH_BYTES_MAX = 107
NAMES_LISTED_MAX = 10


class CommandError(NbdBackupError):
    """The server answered a command with an error; `error_class` is QMP's class of it."""

    def __init__(self, error_class: str, description: str) -> None:
        super().__init__(description)
        self.error_class = error_class


class ServerGoneError(NbdBackupError):
    """The connection to the server ended before it answered."""


class Control:
    """An open QMP connection to the server at `path`; see `connected`."""

    def __init__(self, path: Path, client: QMPClient) -> None:
        self.path = path
        self._client = client

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run one QMP command; what it returned.

        Raises:
            CommandError: the server refused it or failed.
            ServerGoneError: the connection ended before the answer.
        """
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise CommandError(error.error_class, error.error.error.desc) from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise self.gone() from error
        except QMPError as error:
            raise NbdBackupError(
                f"the server on {self.path} sent something that is not QMP: {error}"
            ) from error

    async def query(self, command: str, result: type[T], arguments: Mapping[str, object] | None = None) -> T:
        """`execute`, with what came back as a `result`.

        Raises also:
            NbdBackupError: the answer does not look like that.
        """
        return self.convert(command, await self.execute(command, arguments), result)

    def convert(self, command: str, answer: object, result: type[T]) -> T:
        """The `answer` to `command` as a `result`; NbdBackupError if it does not look like that."""
        try:
            return msgspec.convert(answer, result)
        except msgspec.ValidationError as error:
            raise NbdBackupError(
                f"the server on {self.path} answered '{command}' with something else than expected: {error}"
            ) from error

    @contextmanager
    def events(self, names: Sequence[str]) -> Iterator[EventListener]:
        """A queue of the events with these `names` that arrive inside this context."""
        with self._client.listener(names) as listener:
            yield listener

    async def wait_gone(self) -> None:
        """Wait until the connection has ended."""
        while self._client.runstate.name == "RUNNING":
            await self._client.runstate_changed()

    def gone(self) -> ServerGoneError:
        """The error to raise when the connection has ended."""
        return ServerGoneError(f"the server on {self.path} went away before the command was done")


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Control]:
    """A connection to the server whose control socket is at `path`.

    Raises:
        NotFoundError: no server listens there.
        NbdBackupError: something listens there that is not one, or lets nobody in.
    """
    if len(str(path).encode()) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"the path of a control socket has at most {SOCKET_PATH_BYTES_MAX} bytes: {path}")
    # The library logs each failure that it also raises.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
    client = QMPClient("nbdbackup")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.connect(str(path))
    except TimeoutError as error:
        raise NbdBackupError(
            f"{path} did not greet within {CONNECT_TIMEOUT_S} s: is it a server's control socket?"
        ) from error
    except ConnectError as error:
        raise _connect_error(path, error.exc) from error
    try:
        yield Control(path, client)
    finally:
        try:
            async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
                await client.disconnect()
        except (QMPError, OSError, EOFError, TimeoutError):
            pass  # it went away by itself; whoever needed it was told so


async def check_node(control: Control, name: str) -> None:
    """Raises NotFoundError if the server has no node called `name`."""
    nodes = await control.query("query-named-block-nodes", list[dict[str, object]])
    if name not in [node.get("node-name") for node in nodes]:
        raise NotFoundError(f"the server on {control.path} has no node '{name}' (see nbdbackup node list)")


async def explained(
    error: CommandError,
    control: Control,
    *,
    nodes: Sequence[str] = (),
    jobs: Sequence[str] = (),
    snapshots: Sequence[str] = (),
) -> NbdBackupError:
    """`error`, as a NotFoundError if it is because one of the named things does not exist.

    QMP has no error class for this that all commands use, so ask the server what there is.
    """
    for kind, wanted, command, key in (
        ("node", nodes, "query-named-block-nodes", "node-name"),
        ("job", jobs, "query-jobs", "id"),
        ("snapshot", snapshots, "x-nbdbackup-query-snapshots", "export"),
    ):
        if not wanted:
            continue
        known = [str(thing.get(key)) for thing in await control.query(command, list[dict[str, object]])]
        for name in wanted:
            if name not in known:
                listed = f"; it has {', '.join(known[:NAMES_LISTED_MAX])}" if known else ""
                return NotFoundError(f"the server on {control.path} has no {kind} '{name}'{listed}")
    if error.error_class in ("DeviceNotFound", "DeviceNotActive"):
        return NotFoundError(str(error))
    return error


def run_async(main: Coroutine[object, object, T]) -> T:
    """Run `main` in an event loop of its own; SIGTERM and SIGHUP are interrupts, as SIGINT is.

    Either way `main` is cancelled and cleans up before KeyboardInterrupt is raised.
    """

    async def interruptible() -> T:
        task = asyncio.current_task()
        assert task is not None
        terminated = False

        def terminate() -> None:
            nonlocal terminated
            if not terminated:
                # A second one must not cut the cleaning up short.
                terminated = True
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            if not is_ignored(number):
                asyncio.get_running_loop().add_signal_handler(number, terminate)
        try:
            return await main
        except asyncio.CancelledError:
            if terminated:
                raise KeyboardInterrupt from None
            raise

    return asyncio.run(interruptible())


def _connect_error(path: Path, cause: Exception) -> NbdBackupError:
    if isinstance(cause, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        return NotFoundError(
            f"no server on {path}: start one with 'nbdbackup serve', or name its socket with --control"
        )
    if isinstance(cause, PermissionError):
        return NbdBackupError(f"may not connect to {path}: run this as the user who started the server")
    if isinstance(cause, OSError) and cause.strerror:
        return NbdBackupError(f"cannot connect to {path}: {cause.strerror}")
    return NbdBackupError(f"{path} is not the control socket of an nbdbackup server: it does not speak QMP")
