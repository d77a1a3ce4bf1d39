"""Commands that QEMU does not have: snapshots as exports."""

from nbdbackup.errors import UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services, SnapshotInfo, SnapshotOptions
from nbdbackup.monitor.schema import Arguments, NoArguments


class SnapshotCreateArguments(Arguments, frozen=True, kw_only=True):
    nodes: list[str]
    name: str | None = None
    scratch: str | None = None
    scratch_max: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: float = 0.0


class SnapshotDropArguments(Arguments, frozen=True, kw_only=True):
    snapshots: list[str]


@command("x-nbdbackup-snapshot-create", SnapshotCreateArguments)
async def snapshot_create(services: Services, arguments: SnapshotCreateArguments) -> Json:
    _check_names("nodes", arguments.nodes)
    _check_positive("scratch-max", arguments.scratch_max)
    if not 0 <= arguments.cbw_timeout < float("inf"):
        raise UsageError("Parameter 'cbw-timeout' expects a non-negative number of seconds")
    options = SnapshotOptions(
        name=arguments.name,
        scratch=arguments.scratch,
        scratch_bytes_max=arguments.scratch_max,
        on_cbw_error=arguments.on_cbw_error,
        cbw_timeout_s=arguments.cbw_timeout,
    )
    return [_snapshot_info(info) for info in await services.snapshots.create(arguments.nodes, options)]


@command("x-nbdbackup-snapshot-drop", SnapshotDropArguments)
async def snapshot_drop(services: Services, arguments: SnapshotDropArguments) -> Json:
    _check_names("snapshots", arguments.snapshots)
    await services.snapshots.drop(arguments.snapshots)
    return {}


@command("x-nbdbackup-query-snapshots", NoArguments)
async def query_snapshots(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_snapshot_info(info) for info in services.snapshots.list()]


def _check_names(parameter: str, names: list[str]) -> None:
    if not names:
        raise UsageError(f"Parameter '{parameter}' expects at least one name")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Parameter '{parameter}' names '{name}' twice")


def _check_positive(parameter: str, value: int | None) -> None:
    if value is not None and value <= 0:
        raise UsageError(f"Parameter '{parameter}' expects a positive number of bytes")


def _snapshot_info(info: SnapshotInfo) -> dict[str, Json]:
    return {
        "node": info.node,
        "name": info.name,
        "export": info.export,
        "uris": list(info.uris),
        "created": info.created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "size": info.size,
        "cluster-size": info.cluster_size,
        "scratch-used": info.scratch_used,
        "scratch-max": info.scratch_max,
        "state": "ok" if info.cause is None else "broken",
        "cause": info.cause,
    }
