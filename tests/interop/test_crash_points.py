"""A server killed at each of its crash points, while it does everything that it can do.

The points are read from the source, so a new one is tested from the day on that it is there; one that no
story comes to is a failure with its name. A life of the server ends at its point, and the next one begins
with what that left behind.
"""

import re
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import nbdbackup
from tests.support.crash_client import TIMEOUT_S, Killed
from tests.support.crash_lives import crashing_world, start
from tests.support.crash_world import LOST, World

SOURCE = Path(nbdbackup.__file__).parent
AFTER = {
    "bitmap.open.removed": "bitmap.remove.withdrawn",
    "bitmap.open.tidied": "bitmap.create.made",
    "checkpoint.load.removed": "checkpoint.create.published",
    "checkpoint.load.taken-back": "checkpoint.change.sealed",
    "snapshot.load.broken": "snapshot.drop.withdrawn",
    "snapshot.open.scratch": "snapshot.create.made",
    "snapshot.open.tidied": "snapshot.create.allocated",
    "snapshot.remove-at-rest.scratch": "snapshot.drop.withdrawn",
}
"""Steps of putting right what a kill at another point has left behind."""
POWER_ONLY = {"bitmap.reclaim.merged"}
"""Steps that there are with `--bitmap-durability power` alone."""
SLOW = 1 << 20
"""Bytes per second, for a backup that is to be cancelled."""
LASTING = 1 << 17
"""For one that is to be interrupted."""


def crash_points() -> list[str]:
    """All that there are in the source."""
    found = [
        name
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "crash_points.py"
        for name in re.findall(r"\breach\((.*?)\)", path.read_text())
    ]
    assert all(re.fullmatch(r'"[a-z-]+(\.[a-z-]+)+"', name) for name in found), "names are literals"
    names = [name.strip('"') for name in found]
    assert len(set(names)) == len(names), "two steps have one name"
    return names


def snapshots(world: World) -> None:
    """Take, break, lose and drop snapshots."""
    gone = [export for export, taken in world.taken.items() if taken.broken]
    if gone:
        world.drop_snapshots(gone)
    kept = world.take_snapshot()
    world.take_snapshot(temporary=True)
    if f"disk@{LOST}" not in world.taken:
        world.take_snapshot(LOST)
    world.take_snapshot(small=True)
    world.look_at_snapshots()
    whole = [export for export, taken in world.taken.items() if not taken.may_break and export != kept]
    world.drop_snapshots(whole)


def bitmaps(world: World) -> None:
    """Everything that users do with bitmaps."""
    world.pull(succeeds=True)
    world.pull(succeeds=False)
    world.merge()
    world.fail_to_clear()
    world.clear_bitmap()
    world.remove_bitmap()
    world.leave_bitmap_without_node()


def checkpoints(world: World) -> None:
    """Make some, and delete one in the middle and the last one."""
    for _ in range(3):
        world.make_checkpoint()
    world.delete_checkpoint(1)
    world.delete_checkpoint(-1)
    world.make_checkpoint(keep_snapshot=True)
    while len(world.checkpoints()) > 2:
        world.delete_checkpoint()


def backups(world: World) -> None:
    """Full and incremental ones; some are cancelled."""
    world.start_backup(full=True)
    world.finish_backup()
    world.start_backup(full=False)
    world.finish_backup()
    world.start_backup(full=False)
    world.finish_backup()
    world.start_backup(full=False, speed=SLOW, mode="always")
    world.cancel_backup()
    world.start_backup(full=True, speed=SLOW)
    world.cancel_backup()
    world.start_backup(full=True, scratch=True)
    world.finish_backup()
    world.start_backup(full=True, scratch=True, speed=LASTING)


Act = Callable[[World], None]
ACTS: dict[str, Act] = {
    "snapshot": snapshots,
    "bitmap": bitmaps,
    "checkpoint": checkpoints,
    "target": backups,
}


def acts_for(point: str) -> Sequence[Act]:
    """Everything; what comes to `point` first."""
    kind = point.split(".")[0]
    first = ACTS.get("target" if kind in ("partial", "job") else kind)
    return sorted(ACTS.values(), key=lambda act: act is not first)


def die_at(world: World, point: str, number: int) -> bool:
    """Live until the `number`th time at `point`; False if that did not come before the end."""
    if not start(world.server, f"{point}:{number}"):
        world.lose_scratch()
        return True
    try:
        world.check()
    except Killed:
        world.server.process.wait(TIMEOUT_S)
        return True

    def story() -> None:
        for act in acts_for(point):
            act(world)

    if not world.live(story):
        world.server.process.send_signal(signal.SIGTERM)
    world.bury()
    status = world.server.process.wait(TIMEOUT_S)
    assert status in (0, -signal.SIGKILL), world.server.log()[-5000:]
    return status != 0


def kill_at(directory: Path, points: Sequence[str], durability: str, number: int) -> Counter[str]:
    """Kill a server at every point, the `number`th time that it comes there; how often at which."""
    kills: Counter[str] = Counter()
    with crashing_world(directory, number, ("--bitmap-durability", durability)) as world:
        # A state directory is made but once.
        for point in sorted(points, key=lambda name: name != "state.version.written"):
            before = AFTER.get(point)
            if before is not None:
                assert die_at(world, before, 1), f"{before} was not reached"
            kills[point] += die_at(world, point, number)
        assert start(world.server)
        world.check()
        done = dict(world.done)
    print(f"{kills.total()} kills, 0 failures, {done}; kills per crash point: {dict(kills)}")
    return kills


@pytest.mark.timeout(280)
def test_a_server_killed_between_two_steps_loses_nothing(tmp_path: Path) -> None:
    points = crash_points()[:: len(ACTS)]
    assert kill_at(tmp_path, points, "process", 1) == Counter(points)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_server_killed_between_any_two_steps_loses_nothing(tmp_path: Path, durability: str) -> None:
    """Every point; the second time that a server comes to one may not be there to be had."""
    kills = kill_at(tmp_path, crash_points(), durability, 1)
    missed = {point for point in crash_points() if not kills[point]}
    assert missed == (POWER_ONLY if durability == "process" else set())
    kill_at(tmp_path, crash_points(), durability, 2)
