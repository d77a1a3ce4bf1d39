"""Commands that are also actions of `transaction`: defined once, used both ways.

`@action` takes a function from arguments to a `Step`, and makes of it a command, which is a transaction
of that one step, and an action that `transaction` combines with others.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services, Step
from nbdbackup.monitor.schema import check_value, convert_arguments

A = TypeVar("A")


class Action(msgspec.Struct, frozen=True):
    """An action whose arguments are still JSON. `check(arguments, path)` raises QmpError for wrong ones.

    `starts_job`: it can be part of a group that completes together.
    """

    name: str
    starts_job: bool
    check: Callable[[Json, str], None]
    make: Callable[[Services, Mapping[str, Json]], Step]


_ACTIONS: dict[str, Action] = {}


def action(
    name: str, arguments_type: type[A], *, is_command: bool = True, starts_job: bool = False
) -> Callable[[Callable[[Services, A], Step]], Callable[[Services, A], Step]]:
    """Make the decorated function the action `name`, and the command too if `is_command`."""

    def register(make: Callable[[Services, A], Step]) -> Callable[[Services, A], Step]:
        assert name not in _ACTIONS
        _ACTIONS[name] = Action(
            name,
            starts_job,
            lambda data, path: check_value(arguments_type, data, path),
            lambda services, data: make(services, convert_arguments(data, arguments_type)),
        )
        if is_command:

            @command(name, arguments_type)
            async def run_alone(services: Services, arguments: A) -> Json:
                await services.transactions.run([make(services, arguments)])
                return {}

        return make

    return register


def find_action(name: str) -> Action | None:
    """The action called `name`, if there is one."""
    return _ACTIONS.get(name)
