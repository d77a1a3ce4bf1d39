"""`transaction`: several actions at one instant, all of them or none."""

from collections.abc import Mapping
from enum import Enum
from typing import cast

from nbdbackup.errors import ConflictError
from nbdbackup.job.events import Json
from nbdbackup.monitor.actions import Action, action, find_action
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services, Step
from nbdbackup.monitor.errors import QmpError
from nbdbackup.monitor.schema import Arguments, NoArguments, check_value


class CompletionMode(Enum):
    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(Arguments, frozen=True, kw_only=True):
    completion_mode: CompletionMode = CompletionMode.INDIVIDUAL


class TransactionArguments(Arguments, frozen=True, kw_only=True):
    actions: list[dict[str, object]]
    properties: TransactionProperties | None = None


@action("abort", NoArguments, is_command=False)
def abort(services: Services, arguments: NoArguments) -> Step:
    """Fail: for tests of whether the other actions are undone."""
    del arguments
    return services.transactions.failing(ConflictError("Transaction aborted using Abort action"))


@command("transaction", TransactionArguments)
async def transaction(services: Services, arguments: TransactionArguments) -> Json:
    chosen = [
        _checked(cast("Mapping[str, Json]", item), f"actions[{index}]")
        for index, item in enumerate(arguments.actions)
    ]
    properties = arguments.properties or TransactionProperties()
    grouped = properties.completion_mode is CompletionMode.GROUPED
    for found, _ in chosen:
        if grouped and not found.starts_job:
            raise QmpError(
                f"Action '{found.name}' does not support transaction property completion-mode = grouped"
            )
    steps = [found.make(services, data) for found, data in chosen]
    await services.transactions.run(steps, grouped=grouped)
    return {}


def _checked(item: Mapping[str, Json], path: str) -> tuple[Action, Mapping[str, Json]]:
    """The action that `item` names, and its arguments, which fit it; in QEMU's order of checks."""
    name = _member(item, "type", path)
    check_value(str, name, f"{path}.type")
    found = find_action(cast(str, name))
    if found is None:
        raise QmpError(f"Parameter 'type' does not accept value '{name}'")
    data = _member(item, "data", path)
    found.check(data, f"{path}.data")
    for member in item:
        if member not in ("type", "data"):
            raise QmpError(f"Parameter '{path}.{member}' is unexpected")
    return found, cast("Mapping[str, Json]", data)


def _member(item: Mapping[str, Json], name: str, path: str) -> Json:
    if name not in item:
        raise QmpError(f"Parameter '{path}.{name}' is missing")
    return item[name]
