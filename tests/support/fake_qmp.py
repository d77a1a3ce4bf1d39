"""A QMP server with canned answers, in a thread, for tests of the commands that talk to one."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {"version": {"qemu": {"major": 1, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}
}
Arguments = Mapping[str, object]


class Refusal(Exception):
    """Answer with an error of class `error_class`."""

    def __init__(self, text: str, error_class: str = "GenericError") -> None:
        super().__init__(text)
        self.error_class = error_class


@dataclass
class Connection:
    """What a command can do besides returning: send events, or hang up."""

    stream: socket.socket

    def event(self, name: str, **data: object) -> None:
        """Send an event; `_` in keys stands for `-`."""
        fields = {key.replace("_", "-"): value for key, value in data.items()}
        self.send({"event": name, "data": fields, "timestamp": {"seconds": 1, "microseconds": 0}})

    def status(self, job: str, *statuses: str) -> None:
        """Send JOB_STATUS_CHANGE for each of `statuses`."""
        for status in statuses:
            self.event("JOB_STATUS_CHANGE", id=job, status=status)

    def hang_up(self) -> None:
        """End the connection as a server does that died."""
        self.stream.shutdown(socket.SHUT_RDWR)

    def send(self, message: object) -> None:
        """Send one JSON message."""
        self.stream.sendall(json.dumps(message).encode() + b"\r\n")


Command = Callable[[Connection, Arguments], object]


@dataclass
class FakeQmp:
    """`commands` maps names to what answers them; `calls` is what was asked, in order."""

    path: Path
    commands: dict[str, Command]
    calls: list[tuple[str, Arguments]] = field(default_factory=list)

    def arguments_of(self, command: str) -> list[Arguments]:
        """The arguments of each call of `command`."""
        return [arguments for name, arguments in self.calls if name == command]


def constant(value: object) -> Command:
    """A command that returns `value`."""
    return lambda connection, arguments: value


def refusal(text: str, error_class: str = "GenericError") -> Command:
    """A command that fails."""

    def refuse(connection: Connection, arguments: Arguments) -> object:
        raise Refusal(text, error_class)

    return refuse


@contextmanager
def fake_qmp(path: Path, **commands: Command) -> Iterator[FakeQmp]:
    """A server on the Unix socket `path`; `_` in the names of `commands` stands for `-`."""
    fake = FakeQmp(path, {name.replace("_", "-"): command for name, command in commands.items()})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=_serve, args=(listener, fake), daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def _serve(listener: socket.socket, fake: FakeQmp) -> None:
    while True:
        try:
            stream, _ = listener.accept()
        except OSError:
            return
        with stream:
            try:
                _serve_connection(Connection(stream), fake)
            except OSError:
                pass  # hung up, by either side


def _serve_connection(connection: Connection, fake: FakeQmp) -> None:
    connection.send(GREETING)
    for message in _messages(connection.stream):
        name, arguments = message["execute"], message.get("arguments", {})
        reply: dict[str, object]
        if name == "qmp_capabilities":
            reply = {"return": {}}
        else:
            fake.calls.append((name, arguments))
            try:
                command = fake.commands.get(name) or refusal(
                    f"The command {name} has not been found", "CommandNotFound"
                )
                reply = {"return": command(connection, arguments)}
            except Refusal as error:
                reply = {"error": {"class": error.error_class, "desc": str(error)}}
        if "id" in message:
            reply["id"] = message["id"]
        connection.send(reply)


def _messages(stream: socket.socket) -> Iterator[dict[str, Any]]:
    """The JSON objects that arrive. Clients put nothing between them, not even a newline."""
    text = ""
    while received := stream.recv(65536):
        text += received.decode()
        while text := text.lstrip():
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield message
