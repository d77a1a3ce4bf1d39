"""What each step of a transaction makes of the bitmaps of the model, or why it refuses to be taken."""

from dataclasses import dataclass

from nbdbackup.extents import Extent
from nbdbackup.job.sync import BitmapSyncMode
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapChange,
    BitmapClear,
    BitmapEnable,
    BitmapMerge,
    BitmapRemove,
)
from tests.model.recorded import Recorded, granules_of, rescaled

DISKS = ("a", "b")


class Refused(Exception):
    """The model refuses a step."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The step `abort`."""


Change = BitmapChange | BackupRequest | Abort


class Model:
    """The bitmaps by node and name, and which targets and job ids are taken."""

    def __init__(self) -> None:
        self.bitmaps: dict[tuple[str, str], Recorded] = {}
        self.taken: set[str] = set()

    def copy(self) -> "Model":
        """To try something on."""
        other = Model()
        other.bitmaps = {key: recorded.copy() for key, recorded in self.bitmaps.items()}
        other.taken = set(self.taken)
        return other

    def free(self, node: str, name: str) -> Recorded:
        """A bitmap that may be used."""
        recorded = self.bitmaps.get((node, name))
        if recorded is None or recorded.busy:
            raise Refused
        return recorded

    def take(self, *names: str) -> None:
        """Nobody else may have these targets and job ids from now on."""
        if not self.taken.isdisjoint(names):
            raise Refused
        self.taken.update(names)

    def do(self, change: Change, contents: dict[str, bytes], in_flight: dict[str, list[Extent]]) -> None:
        """Take one step.

        Raises:
            Refused: it cannot be taken.
        """
        match change:
            case Abort():
                raise Refused
            case BackupRequest():
                self._do_backup(change, contents, in_flight)
            case BitmapAdd():
                if (change.node, change.name) in self.bitmaps:
                    raise Refused
                assert change.granularity is not None
                self.bitmaps[change.node, change.name] = recorded = Recorded(
                    change.name,
                    DISKS.index(change.node),
                    change.granularity,
                    change.enabled,
                    contents[change.node],
                    set(),
                )
                recorded.may = _touched(recorded, in_flight)
            case BitmapRemove():
                self.free(change.node, change.name).removing = True
            case BitmapClear():
                recorded = self.free(change.node, change.name)
                recorded.clear(contents[change.node], _touched(recorded, in_flight))
            case BitmapEnable():
                recorded = self.free(change.node, change.name)
                if change.enabled and not recorded.enabled:
                    recorded.base = contents[change.node]
                recorded.enabled = change.enabled
            case BitmapMerge():
                self._do_merge(change)

    def _do_merge(self, change: BitmapMerge) -> None:
        recorded = self.free(change.node, change.target)
        found: set[int] = set()
        for node, name in change.sources:
            source = self.free(node, name)
            found |= rescaled(source.bits, source.granularity, recorded.granularity)
        recorded.bits |= found
        recorded.may |= found

    def _do_backup(
        self, change: BackupRequest, contents: dict[str, bytes], in_flight: dict[str, list[Extent]]
    ) -> None:
        assert isinstance(change.target, TargetNode)
        assert change.job_id is not None
        sync = change.sync
        if sync.bitmap is not None:
            recorded = self.free(change.node, sync.bitmap)
            mode = sync.bitmap_mode or BitmapSyncMode.ON_SUCCESS
            if mode is BitmapSyncMode.NEVER and not sync.mode.copies_dirty:
                raise Refused
            recorded.freeze(change.job_id, mode, contents[change.node], _touched(recorded, in_flight))
        self.take(change.target.node, change.job_id)


def _touched(recorded: Recorded, in_flight: dict[str, list[Extent]]) -> set[int]:
    found: set[int] = set()
    for area in in_flight[DISKS[recorded.disk]]:
        found |= granules_of(area, recorded.granularity)
    return found
