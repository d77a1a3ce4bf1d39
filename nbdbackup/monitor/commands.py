"""The table of commands: name, arguments, handler.

The handlers are in the `commands_*` modules; each is one `@command`. A handler gets the
services and its arguments, already checked, and returns what `return` will hold.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

from nbdbackup.job.events import Json
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.errors import CommandNotFoundError
from nbdbackup.monitor.schema import convert_arguments

A = TypeVar("A")
Handler = Callable[[Services, A], Awaitable[Json]]


class Command(msgspec.Struct, frozen=True):
    """A command whose arguments are still JSON."""

    name: str
    call: Callable[[Services, Mapping[str, Json]], Awaitable[Json]]


_COMMANDS: dict[str, Command] = {}


def command(name: str, arguments_type: type[A]) -> Callable[[Handler[A]], Handler[A]]:
    """Make the decorated handler the command `name`, with arguments of `arguments_type`."""

    def register(handler: Handler[A]) -> Handler[A]:
        assert name not in _COMMANDS

        async def call(services: Services, arguments: Mapping[str, Json]) -> Json:
            return await handler(services, convert_arguments(arguments, arguments_type))

        _COMMANDS[name] = Command(name, call)
        return handler

    return register


def find_command(name: str) -> Command:
    """The command called `name`.

    Raises:
        CommandNotFoundError: there is none.
    """
    found = _COMMANDS.get(name)
    if found is None:
        raise CommandNotFoundError(f"The command {name} has not been found")
    return found


def command_names() -> list[str]:
    """The names of all commands, sorted."""
    return sorted(_COMMANDS)
