"""The daemon's end with jobs running (QEMU's test 185)."""

import pytest

from tests.oracle import differences
from tests.oracle.backups import BY_HAND, HELD, disks, start
from tests.oracle.both import Both
from tests.oracle.masks import PROGRESS
from tests.oracle.script import script


async def _quit(both: Both) -> None:
    both.imprecise("j", PROGRESS)
    both.events_differ("", differences.SHUTDOWN)
    assert await both.quit() == 0
    both.content("disk.img")


@pytest.mark.parametrize("status", ["running", "paused"])
@script()
async def test_quit_cancels_jobs(both: Both, status: str) -> None:
    await disks(both)
    await start(both, **HELD)
    if status == "paused":
        await both.run("job-pause", id="j")
    await both.wait_query("j", status)
    await _quit(both)


@script()
async def test_quit_cancels_what_waits_to_be_finalized(both: Both) -> None:
    await disks(both)
    await start(both, **BY_HAND)
    await both.wait("j", "pending")
    await _quit(both)


@script()
async def test_quit_without_jobs(both: Both) -> None:
    await disks(both)
    await _quit(both)
