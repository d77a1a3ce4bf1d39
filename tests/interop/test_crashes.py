"""kill -9 at random moments, while everything goes on: what each restart finds is held against a model.

Clients write all the time while snapshots, bitmaps and checkpoints are made, backed up and deleted at random
and backup jobs run; and the server is killed, now and then while it starts, too. `tests.support.crash_world`
says what has to be so after each restart.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.crash_client import TIMEOUT_S
from tests.support.crash_lives import crashing_world, start
from tests.support.crash_world import CHECKPOINTS_MAX, LOST, SNAPSHOTS_MAX, World

KILL_AFTER_S_MAX = 0.8
START_S_MAX = 0.5
KILLS_PER_SEED = 10
SEEDS = int(os.environ.get("NBDBACKUP_CRASH_SEEDS", "8"))
"""Of the slow form: what CI has time for. A round takes about a second and a half."""


class Crashes:
    """Random lives of the server of `world`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.steps: dict[Callable[[], None], int] = {
            self._checkpoint: 4,
            self._delete: 2,
            self._pull: 2,
            self._snapshot: 2,
            self._drop: 2,
            self._backup: 4,
            self._end_backup: 3,
            world.look_at_snapshots: 1,
            world.merge: 1,
            world.clear_bitmap: 1,
            world.fail_to_clear: 1,
            world.remove_bitmap: 1,
            world.leave_bitmap_without_node: 1,
        }

    def round(self) -> None:
        """Writes and commands until a kill, a restart, and the check."""
        killer = threading.Timer(self.random.uniform(0.05, KILL_AFTER_S_MAX), self.world.server.process.kill)
        killer.start()
        try:
            assert self.world.live(self._story)
        finally:
            killer.join(TIMEOUT_S)
        self.world.bury()
        self.world.done["kills"] += 1
        self._restart()
        self.world.check()

    def _story(self) -> None:
        steps, weights = list(self.steps), list(self.steps.values())
        while True:
            (step,) = self.random.choices(steps, weights)
            step()
            self.world.done[step.__name__.strip("_")] += 1

    def _restart(self) -> None:
        """Start it, and now and then kill it in the middle of that."""
        server = self.world.server
        while self.random.random() < 0.3:
            killer = threading.Timer(self.random.uniform(0.05, START_S_MAX), lambda: server.process.kill())
            killer.start()
            start(server)
            killer.join(TIMEOUT_S)
            server.kill()
            self.world.done["kills while starting"] += 1
        assert start(server)

    # Steps.

    def _checkpoint(self) -> None:
        if len(self.world.checkpoints()) >= CHECKPOINTS_MAX:
            self._delete()
        else:
            self.world.make_checkpoint(keep_snapshot=self.random.random() < 0.2)

    def _delete(self) -> None:
        self.world.delete_checkpoint(self.random.randrange(CHECKPOINTS_MAX))

    def _pull(self) -> None:
        self.world.pull(succeeds=self.random.random() < 0.7)

    def _snapshot(self) -> None:
        if len(self.world.taken) >= SNAPSHOTS_MAX:
            return self._drop()
        name = self.random.choice(["", "", "", LOST])
        if f"disk@{name}" not in self.world.taken:
            chance = self.random.random()
            self.world.take_snapshot(name, temporary=chance < 0.2 and not name, small=chance > 0.8)
        return None

    def _drop(self) -> None:
        exports = list(self.world.taken)
        count = min(len(exports), self.random.randrange(1, 3))
        if count:
            self.world.drop_snapshots(self.random.sample(exports, count))

    def _backup(self) -> None:
        self._end_backup()
        self.world.start_backup(
            full=self.random.random() < 0.5,
            speed=self.random.choice([0, 8 << 20, 32 << 20]),
            mode=self.random.choice(["", "always"]),
            scratch=self.random.random() < 0.5,
        )

    def _end_backup(self) -> None:
        if self.random.random() < 0.3:
            self.world.cancel_backup()
        else:
            self.world.speed_up_backup()
            self.world.finish_backup()


def crash(directory: Path, seed: int, kills: int, durability: str) -> Counter[str]:
    """Kill a server of a new disk as many times; what was done."""
    with crashing_world(directory, seed, ("--bitmap-durability", durability)) as world:
        assert start(world.server)
        crashes = Crashes(world)
        for _ in range(kills):
            crashes.round()
    return world.done


@pytest.mark.timeout(280)
@pytest.mark.parametrize("durability", ["process", "power"])
def test_nothing_is_lost_whenever_the_server_is_killed(tmp_path: Path, durability: str) -> None:
    done = crash(tmp_path, 1, 5, durability)
    print(dict(done))
    assert done["kills"] == 5
    assert done["bitmaps"]


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_nothing_is_lost_in_many_lives_of_servers(tmp_path: Path) -> None:
    done: Counter[str] = Counter()
    begun = time.monotonic()
    for seed in range(100, 100 + SEEDS):
        done += crash(tmp_path, seed, KILLS_PER_SEED, "power" if seed % 3 == 0 else "process")
    rounds = KILLS_PER_SEED * SEEDS
    print(f"{rounds} rounds in {time.monotonic() - begun:.0f} s, 0 failures: {dict(done)}")
    assert done["kills"] == rounds
    assert all(done[what] for what in ("bitmaps", "views", "targets", "clean granules"))
