"""What the daemon's services tell the monitor's clients, beside the jobs' events."""

import logging
from collections.abc import Callable

from nbdbackup.fleece.snapshots import Snapshot
from nbdbackup.job.events import Event, Json

logger = logging.getLogger(__name__)


class Announcer:
    """Passes events on to those who listen; nobody does while the daemon starts."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Tell everybody."""
        for listener in self._listeners:
            listener(event)

    def export_deleted(self, export_id: str) -> None:
        """The export is gone, and its clients with it."""
        self.publish(Event("BLOCK_EXPORT_DELETED", {"id": export_id}))

    def threshold_exceeded(self, node: str, amount: int, threshold: int) -> None:
        """Somebody writes `amount` bytes beyond byte `threshold` of `node`."""
        data: dict[str, Json] = {"node-name": node, "amount-exceeded": amount, "write-threshold": threshold}
        self.publish(Event("BLOCK_WRITE_THRESHOLD", data))

    def watch(self, snapshot: Snapshot) -> None:
        """Tell when most of the space that the scratch of `snapshot` may take is taken."""
        name = snapshot.export_name

        def announce(used: int, threshold: int, used_max: int) -> None:
            logger.warning("scratch of %s is filling: %d of %d bytes used", name, used, used_max)
            data: dict[str, Json] = {
                "node-name": name,
                "amount-exceeded": used - threshold,
                "write-threshold": threshold,
                "x-nbdbackup-scratch-used": used,
                "x-nbdbackup-scratch-max": used_max,
            }
            self.publish(Event("BLOCK_WRITE_THRESHOLD", data))

        snapshot.plan.scratch.watch(announce)
