"""The leftovers of a state directory while no server uses it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbdbackup.daemon.bitmaps import Bitmaps
from nbdbackup.daemon.events import Announcer
from nbdbackup.daemon.graph import Graph
from nbdbackup.daemon.jobs.store import JobStore
from nbdbackup.daemon.leftovers import Leftovers
from nbdbackup.daemon.partials import PartialFiles
from nbdbackup.daemon.state_dir import StateDirectory, is_state_directory
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps
from nbdbackup.daemon.stored_snapshots import StoredSnapshots
from nbdbackup.errors import NotFoundError
from nbdbackup.server.exports import ExportTable


@asynccontextmanager
async def leftovers_at_rest(directory: Path) -> AsyncIterator[Leftovers]:
    """Those of the state directory `directory`, which no server can use meanwhile. No node is there.

    Raises:
        NotFoundError: it is no state directory. ConflictError: a server uses it.
        DeviceError: it cannot be used.
    """
    if not is_state_directory(directory):
        raise NotFoundError(f"{directory} is no state directory of nbdbackup: name one with --state-dir")
    state = StateDirectory(directory, if_used="talk to that with --control")
    state.open()
    try:
        exports = ExportTable()
        bitmaps = StoredBitmaps(state.bitmaps, power=False)
        snapshots = StoredSnapshots(state.snapshots)
        try:
            await bitmaps.open()
            await snapshots.open()
            jobs = JobStore(state.jobs)
            jobs.open()
            partials = PartialFiles(state.partials)
            partials.owners.append(jobs.partials_at_rest)
            services = Bitmaps(Graph(exports, Announcer()), exports, bitmaps)
            await services.chains.open()
            yield Leftovers(state.scratch, partials, services, snapshots, jobs)
        finally:
            snapshots.close()
            bitmaps.close()
    finally:
        state.close()
