"""Housekeeping: what crashes, and sources that are not served any more, left behind."""

from nbdbackup.errors import UsageError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import Arguments, NoArguments
from nbdbackup.monitor.services_state import LeftoverInfo


class CleanArguments(Arguments, frozen=True, kw_only=True):
    paths: list[str] | None = None
    all: bool = False


@command("x-nbdbackup-query-leftovers", NoArguments)
async def query_leftovers(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_info(info) for info in await services.state.leftovers()]


@command("x-nbdbackup-clean-leftovers", CleanArguments)
async def clean_leftovers(services: Services, arguments: CleanArguments) -> Json:
    """Returns those that were removed."""
    if arguments.all and arguments.paths is not None:
        raise UsageError("Either 'paths' or 'all' may be given, not both")
    return [_info(info) for info in await services.state.clean(arguments.paths, everything=arguments.all)]


def _info(info: LeftoverInfo) -> dict[str, Json]:
    return {
        "kind": info.kind,
        "path": info.path,
        "size": info.size,
        "reason": info.reason,
        "kept": info.kept,
    }
