"""Housekeeping: what crashes, and sources that are not served any more, left behind."""

from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import Arguments, NoArguments
from nbdbackup.monitor.services_state import LeftoverInfo


class CleanArguments(Arguments, frozen=True, kw_only=True):
    paths: list[str] | None = None


@command("x-nbdbackup-query-leftovers", NoArguments)
async def query_leftovers(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_info(info) for info in await services.state.leftovers()]


@command("x-nbdbackup-clean-leftovers", CleanArguments)
async def clean_leftovers(services: Services, arguments: CleanArguments) -> Json:
    """Returns those that were removed."""
    return [_info(info) for info in await services.state.clean(arguments.paths)]


def _info(info: LeftoverInfo) -> dict[str, Json]:
    return {"kind": info.kind, "path": info.path, "size": info.size, "reason": info.reason}
