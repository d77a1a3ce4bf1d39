"""Checkpoints, which QEMU does not have: switch of bitmaps and point in time in one command."""

from nbdbackup.errors import UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.commands_snapshots import SnapshotCreateArguments, check_names, snapshot_info
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import Arguments, NoArguments
from nbdbackup.monitor.services_snapshots import CheckpointInfo


class CheckpointCreateArguments(Arguments, frozen=True, kw_only=True):
    nodes: list[str]
    name: str
    scratch: str | None = None
    scratch_max: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: float = 0.0
    temporary: bool = False


class CheckpointDeleteArguments(Arguments, frozen=True, kw_only=True):
    nodes: list[str] | None = None
    name: str


@command("x-nbdbackup-checkpoint-create", CheckpointCreateArguments)
async def checkpoint_create(services: Services, arguments: CheckpointCreateArguments) -> Json:
    """Returns the snapshots that were taken at the same instant."""
    snapshots = SnapshotCreateArguments(
        nodes=arguments.nodes,
        name=arguments.name,
        scratch=arguments.scratch,
        scratch_max=arguments.scratch_max,
        on_cbw_error=arguments.on_cbw_error,
        cbw_timeout=arguments.cbw_timeout,
        temporary=arguments.temporary,
    )
    made = await services.checkpoints.create(arguments.nodes, snapshots.options())
    return [snapshot_info(info) for info in made]


@command("x-nbdbackup-checkpoint-delete", CheckpointDeleteArguments)
async def checkpoint_delete(services: Services, arguments: CheckpointDeleteArguments) -> Json:
    """Returns those that there were: to delete what is gone already is no error."""
    if arguments.nodes is not None:
        check_names("nodes", arguments.nodes)
    if not arguments.name:
        raise UsageError("Parameter 'name' expects the name of a checkpoint")
    gone = await services.checkpoints.delete(arguments.nodes or (), arguments.name)
    return [_info(info) for info in gone]


@command("x-nbdbackup-query-checkpoints", NoArguments)
async def query_checkpoints(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_info(info) for info in services.checkpoints.list()]


def _info(info: CheckpointInfo) -> dict[str, Json]:
    answer: dict[str, Json] = {
        "node": info.node,
        "name": info.name,
        "uuid": info.uuid,
        "parent": info.parent,
        "created": info.created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "dirty": info.dirty,
        "granularity": info.granularity,
    }
    if info.inconsistent:
        answer |= {"inconsistent": True, "x-nbdbackup-inconsistent-because": info.inconsistent}
    return answer
