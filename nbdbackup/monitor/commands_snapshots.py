"""Commands that QEMU does not have: snapshots as exports."""

from nbdbackup.errors import UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import Arguments, NoArguments
from nbdbackup.monitor.services_snapshots import SnapshotInfo, SnapshotOptions


class SnapshotCreateArguments(Arguments, frozen=True, kw_only=True):
    nodes: list[str]
    name: str | None = None
    scratch: str | None = None
    scratch_max: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: float = 0.0
    bitmap: str | None = None
    temporary: bool = False

    def options(self) -> SnapshotOptions:
        """How the snapshots are to be kept.

        Raises:
            UsageError: not like that.
        """
        check_names("nodes", self.nodes)
        _check_positive("scratch-max", self.scratch_max)
        if not 0 <= self.cbw_timeout < float("inf"):
            raise UsageError("Parameter 'cbw-timeout' expects a non-negative number of seconds")
        return SnapshotOptions(
            name=self.name,
            scratch=self.scratch,
            scratch_bytes_max=self.scratch_max,
            on_cbw_error=self.on_cbw_error,
            cbw_timeout_s=self.cbw_timeout,
            bitmap=self.bitmap,
            temporary=self.temporary,
        )


class SnapshotDropArguments(Arguments, frozen=True, kw_only=True):
    snapshots: list[str]
    pulled: bool = False


@command("x-nbdbackup-snapshot-create", SnapshotCreateArguments)
async def snapshot_create(services: Services, arguments: SnapshotCreateArguments) -> Json:
    taken = await services.snapshots.create(arguments.nodes, arguments.options())
    return [snapshot_info(info) for info in taken]


@command("x-nbdbackup-snapshot-drop", SnapshotDropArguments)
async def snapshot_drop(services: Services, arguments: SnapshotDropArguments) -> Json:
    check_names("snapshots", arguments.snapshots)
    await services.snapshots.drop(arguments.snapshots, pulled=arguments.pulled)
    return {}


@command("x-nbdbackup-query-snapshots", NoArguments)
async def query_snapshots(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [snapshot_info(info) for info in services.snapshots.list()]


def check_names(parameter: str, names: list[str]) -> None:
    """Raises UsageError if there are none, or one is there twice."""
    if not names:
        raise UsageError(f"Parameter '{parameter}' expects at least one name")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Parameter '{parameter}' names '{name}' twice")


def _check_positive(parameter: str, value: int | None) -> None:
    if value is not None and value <= 0:
        raise UsageError(f"Parameter '{parameter}' expects a positive number of bytes")


def snapshot_info(info: SnapshotInfo) -> dict[str, Json]:
    """What is told of a snapshot."""
    return {
        "node": info.node,
        "name": info.name,
        "export": info.export,
        "uris": list(info.uris),
        "created": "" if info.created is None else info.created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "size": info.size,
        "cluster-size": info.cluster_size,
        "scratch-used": info.scratch_used,
        "scratch-max": info.scratch_max,
        "state": "ok" if info.cause is None else "broken",
        "cause": info.cause,
        "bitmap": info.bitmap,
        "persistent": info.persistent,
    }
