"""A server that is killed again and again, and the model that it is held against after each restart.

One disk, written to all the time, with bitmaps, checkpoints, snapshots and backups of every kind. Commands
are steps of `World`; whatever was asked for when the server died may have been done or not, and nothing in
between. After each restart `check` sees that

- every write that was acknowledged is there;
- a snapshot that was taken shows its point in time, which is one of the disk's contents between the asking
  and the answer; a dropped one is gone;
- what differs from a backup is dirty in what its bitmap, or its checkpoint and those after it, say;
- a backup that was interrupted is there, paused, and goes on at its instant or is cancelled;
- a file that is called TARGET is a whole backup of one instant, and TARGET.partial is a known leftover;
- there is no file that nobody owns, nothing inconsistent, and after `state clean` no leftover.
"""

import json
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.crash_client import (
    CUT_OFF,
    TIMEOUT_S,
    Journal,
    Killed,
    Qmp,
    Writer,
    acknowledged,
    asked,
    read_export,
    succeeded,
)
from tests.support.disks import make_sparse
from tests.support.peers import require
from tests.support.processes import run
from tests.support.server import Server

GRANULE = 65536
GRANULES = 128
SIZE = GRANULES * GRANULE
WRITERS = 2
CHECKPOINTS_MAX = 5
SNAPSHOTS_MAX = 4
DEATH_TIMEOUT_S = 3.0
"""A server whose client was cut off is dead by then, or the client's failure is the server's."""
SMALL_SCRATCH = 2 * GRANULE
PULLED, COPIED, MERGED = "b", "j", "m"
"""Bitmaps: of pulls, of jobs, and one that others are merged into."""
LOST = "lost"
"""The snapshot whose scratch is removed whenever the server is dead."""


@dataclass
class Taken:
    """A snapshot that was asked for, between so many requests of each writer."""

    since: tuple[int, ...]
    until: tuple[int, ...] | None = None
    """None: until the server died."""
    content: bytes | None = None
    """None: nobody has read it yet."""
    promised: bool = False
    dropping: bool = False
    temporary: bool = False
    may_break: bool = False
    broken: bool = False
    holds: str = ""
    """The bitmap that is frozen for it, as far as a restart has shown."""


@dataclass
class Copying:
    """A backup that was asked for; `target` is to be a whole one."""

    job: str
    target: Path
    since: tuple[int, ...]
    until: tuple[int, ...] | None = None


class World:
    """The disk, its server, and what is known of both."""

    def __init__(self, server: Server, disk: Path, seed: int) -> None:
        self.server = server
        self.disk = disk
        self.random = random.Random(seed)
        self.targets = disk.with_name(f"{disk.stem}-targets")
        self.targets.mkdir()
        self.increments = make_sparse(self.targets / "increments", SIZE)
        self.other = make_sparse(disk.with_name(f"{disk.stem}-other.img"), GRANULE)
        self.qmp: Qmp | None = None
        self.journals: list[Journal] = []
        self.claims: dict[str, bytes] = {}
        """What a backup holds, by the bitmap or checkpoint that says what differs from it."""
        self.increments_valid = False
        self.taken: dict[str, Taken] = {}
        self.copying: Copying | None = None
        self.number = 0
        self.done: Counter[str] = Counter()

    def close(self) -> None:
        """Remove the files; the server is stopped."""
        for path in (*self.targets.iterdir(), self.disk, self.other):
            path.unlink()

    # One life of the server.

    def live(self, story: Callable[[], None]) -> bool:
        """Write all the time while `story` gives commands; whether the server died before its end.

        If it lived on, whoever gave the story has to end it: the writers stop with the server.
        """
        disk, part = self.disk.read_bytes(), SIZE // WRITERS
        self.journals = [Journal(at, disk[at : at + part]) for at in range(0, SIZE, part)]
        self._writers = [Writer(self.server, each, self.random.randrange(1 << 30)) for each in self.journals]
        for writer in self._writers:
            writer.start()
        try:
            self.qmp = Qmp(self.server)
            story()
        except Killed:
            return True
        finally:
            if self.qmp is not None:
                self.qmp.close()
                self.qmp = None
        return False

    def survives(self, failure: Exception) -> Exception:
        """What to raise when a client failed: that, or Killed if it is because the server died."""
        with suppress(subprocess.TimeoutExpired):
            self.server.process.wait(DEATH_TIMEOUT_S)
            return Killed()
        return failure

    def bury(self) -> None:
        """The server is dead, or about to be: wait for that, and look at the disk."""
        self.server.process.wait(TIMEOUT_S)
        for writer in self._writers:
            writer.join(TIMEOUT_S)
            assert not writer.is_alive()
            assert not writer.errors, f"writes failed: {writer.errors}"
        disk = self.disk.read_bytes()
        for journal in self.journals:
            journal.check_disk(disk)
            self.done["writes"] += journal.acknowledged
            self.done["flushed writes"] += journal.flushed
        self.lose_scratch()

    def lose_scratch(self) -> None:
        """Take away the scratch of the snapshot LOST."""
        for path in (self.server.state_dir / "scratch").glob(f"disk@{LOST}.*"):
            path.unlink()

    def ask(self, command: str, **arguments: object) -> object:
        """The answer to a command."""
        assert self.qmp is not None
        return self.qmp.execute(command, **arguments)

    def is_instant(self, content: bytes, since: Sequence[int], until: Sequence[int] | None) -> bool:
        """Whether the disk held `content` between so many requests of each writer of the last life."""
        until = asked(self.journals) if until is None else until
        return all(
            journal.has_instant(content, first, last)
            for journal, first, last in zip(self.journals, since, until, strict=True)
        )

    def new_name(self, kind: str) -> str:
        """A name that nothing has had."""
        self.number += 1
        return f"{kind}{self.number}"

    # Steps: snapshots.

    def take_snapshot(
        self, name: str = "", *, bitmap: str = "", temporary: bool = False, small: bool = False
    ) -> str | None:
        """The export, read once; None if it was not taken, or is broken already."""
        name = name or self.new_name("s")
        more: dict[str, object] = {"temporary": temporary}
        if bitmap:
            more["bitmap"] = bitmap
        if small:
            more["scratch_max"] = SMALL_SCRATCH
        taken = self._begin(name, temporary=temporary, may_break=small or name == LOST)
        answer = self.ask("x-nbdbackup-snapshot-create", nodes=["disk"], name=name, **more)
        return self._note_taken(f"disk@{name}", taken, answer)

    def _begin(self, name: str, *, temporary: bool = False, may_break: bool = False) -> Taken:
        taken = Taken(acknowledged(self.journals), temporary=temporary, may_break=may_break)
        return self.taken.setdefault(f"disk@{name}", taken)

    def _note_taken(self, export: str, taken: Taken, answer: object) -> str | None:
        if not succeeded(answer):
            if not taken.promised:
                del self.taken[export]
            return None
        taken.promised, taken.until = True, asked(self.journals)
        if not taken.may_break:
            self._see(export, taken)
        return export

    def _see(self, export: str, taken: Taken) -> None:
        """Read the snapshot, which is not broken, and hold it against what it has to show."""
        try:
            content = read_export(self.server, export, SIZE)
        except CUT_OFF as error:
            raise self.survives(error) from error
        if taken.content is None:
            assert self.is_instant(content, taken.since, taken.until), f"{export} is of no instant"
            taken.content = content
        assert content == taken.content, f"{export} does not show its point in time any more"
        self.done["views"] += 1

    def look_at_snapshots(self) -> None:
        """Read every snapshot that is whole."""
        for export, taken in self.taken.items():
            if not taken.may_break:
                self._see(export, taken)

    def drop_snapshots(self, exports: Sequence[str], *, pulled: bool = False) -> None:
        for export in exports:
            self.taken[export].dropping = True
        answer = self.ask("x-nbdbackup-snapshot-drop", snapshots=list(exports), pulled=pulled)
        assert succeeded(answer), answer
        for export in exports:
            del self.taken[export]

    # Steps: bitmaps and checkpoints.

    def make_checkpoint(self, *, keep_snapshot: bool = False) -> None:
        name = self.new_name("c")
        taken = self._begin(name)
        answer = self.ask("x-nbdbackup-checkpoint-create", nodes=["disk"], name=name)
        if self._note_taken(f"disk@{name}", taken, answer) is None:
            return
        assert taken.content is not None
        self.claims[name] = taken.content
        if not keep_snapshot:
            self.drop_snapshots([f"disk@{name}"])

    def checkpoints(self) -> list[str]:
        """Their names, the oldest first."""
        assert self.qmp is not None
        return [str(found["name"]) for found in self.qmp.ask("x-nbdbackup-query-checkpoints")]

    def delete_checkpoint(self, index: int = 0) -> None:
        """Delete one of them; its snapshot, if it is there still, stays."""
        if found := self.checkpoints():
            answer = self.ask("x-nbdbackup-checkpoint-delete", name=found[index % len(found)])
            assert succeeded(answer), answer

    def add_bitmap(self, name: str) -> None:
        """Do so if there is none; it is of no backup yet."""
        if succeeded(self.ask("block-dirty-bitmap-add", node="disk", name=name, persistent=True)):
            self.claims.pop(name, None)

    def pull(self, *, succeeds: bool) -> None:
        """Back up with the bitmap PULLED, by reading a snapshot: one that a death has left, if any."""
        self.add_bitmap(PULLED)
        holding = [export for export, taken in self.taken.items() if taken.holds == PULLED]
        export = holding[0] if holding else self.take_snapshot(bitmap=PULLED)
        if export is None:
            return
        if succeeds:
            content = self.taken[export].content
            assert content is not None
            # The old one may be overwritten: from now on there is the new one.
            self.claims[PULLED] = content
        self.drop_snapshots([export], pulled=succeeds)

    def merge(self) -> None:
        """MERGED knows from now on what PULLED does."""
        self.add_bitmap(MERGED)
        claim = self.claims.get(PULLED)
        if succeeded(self.ask("block-dirty-bitmap-merge", node="disk", target=MERGED, bitmaps=[PULLED])):
            if claim is None:
                self.claims.pop(MERGED, None)
            else:
                self.claims[MERGED] = claim

    def clear_bitmap(self) -> None:
        self.claims.pop(MERGED, None)
        self.ask("block-dirty-bitmap-clear", node="disk", name=MERGED)

    def fail_to_clear(self) -> None:
        """A transaction that clears both and fails: nothing has changed."""
        change = [
            {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": name}}
            for name in (MERGED, PULLED)
        ]
        answer = self.ask("transaction", actions=[*change, {"type": "abort", "data": {}}])
        assert not succeeded(answer)

    def remove_bitmap(self) -> None:
        self.claims.pop(MERGED, None)
        self.ask("block-dirty-bitmap-remove", node="disk", name=MERGED)

    def leave_bitmap_without_node(self) -> None:
        """Make a bitmap of a node that goes, and have it cleaned away."""
        self.ask("blockdev-add", driver="file", node_name="other", filename=str(self.other))
        self.ask("block-dirty-bitmap-add", node="other", name="o", persistent=True)
        self.ask("blockdev-del", node_name="other")
        self.clean()

    def clean(self) -> None:
        """Remove leftovers."""
        answer = self.ask("x-nbdbackup-clean-leftovers", all=True)
        assert succeeded(answer), answer

    # Steps: jobs.

    def start_backup(
        self, *, full: bool, speed: int = 0, mode: str = "", scratch: bool = False
    ) -> Copying | None:
        """A full backup to a new file, or of what COPIED says to `increments`; None if there is one."""
        if self.copying is not None:
            return None
        job = self.new_name("job")
        target = self.targets / job if full else self.increments
        since = acknowledged(self.journals)
        more: dict[str, object] = {"sync": "full"}
        if scratch:
            more["scratch"] = str(self.server.state_dir / "scratch")
        if not full:
            self.add_bitmap(COPIED)
            mode = mode or "on-success"
            sync = "bitmap" if self.increments_valid else "full"
            more |= {"sync": sync, "bitmap": COPIED, "bitmap_mode": mode, "existing": True}
        self.copying = Copying(job, target, since)
        answer = self.ask(
            "x-nbdbackup-backup", node="disk", target=str(target), job_id=job, speed=speed, **more
        )
        if not succeeded(answer):
            self.copying = None
            return None
        self.copying.until = asked(self.journals)
        return self.copying

    def finish_backup(self) -> None:
        """Wait for the job that runs, if one does, and look at its target."""
        copying = self.copying
        if copying is None:
            return
        assert self.qmp is not None
        if not self.qmp.wait_job_ended(copying.job):
            self.copying = None
            return
        self._look_at_target(copying)
        self.copying = None

    def speed_up_backup(self) -> None:
        if self.copying is not None:
            self.ask("block-job-set-speed", device=self.copying.job, speed=0)

    def cancel_backup(self) -> None:
        if self.copying is not None:
            self.ask("job-cancel", id=self.copying.job)
            self.finish_backup()

    def _look_at_target(self, copying: Copying) -> None:
        content = copying.target.read_bytes()
        assert self.is_instant(content, copying.since, copying.until), f"{copying.target} is no whole backup"
        self.done["targets"] += 1
        if copying.target == self.increments:
            self.increments_valid = True
        else:
            copying.target.unlink()

    # After a restart.

    def check(self) -> None:
        """See the module's docstring. Nobody writes.

        Raises:
            Killed: the server died again.
        """
        self.qmp = Qmp(self.server)
        try:
            self._settle_jobs()
            self._check_targets()
            self._check_snapshots()
            self._check_bitmaps()
            self._check_files()
        finally:
            self.qmp.close()
            self.qmp = None

    def _settle_jobs(self) -> None:
        """A backup that was interrupted is paused at its instant: let it go on, or give it up."""
        assert self.qmp is not None
        copying = self.copying
        for job in self.qmp.ask("query-jobs"):
            assert copying is not None
            assert (job["id"], job["status"]) == (copying.job, "paused"), job
            self.done["interrupted"] += 1
            if self.random.random() < 0.7:
                self.speed_up_backup()
                self.ask("job-resume", id=copying.job)
                self.finish_backup()
            else:
                self.cancel_backup()
            assert self.copying is None

    def _check_targets(self) -> None:
        assert self.qmp is not None
        copying, expected = self.copying, {self.increments.name}
        partial = None
        if copying is not None and copying.target != self.increments:
            partial = copying.target.with_name(f"{copying.target.name}.partial")
            if copying.target.exists():
                self._look_at_target(copying)
            expected.add(partial.name)
        assert {path.name for path in self.targets.iterdir()} <= expected
        left = self.qmp.ask("x-nbdbackup-query-leftovers")
        known = {str(info["path"]) for info in left if info["kind"] == "partial"}
        if partial is not None and partial.exists():
            assert str(partial) in known
        assert all(info["kind"] == "partial" or "node 'other'" in str(info["reason"]) for info in left)
        self.clean()
        assert self.qmp.ask("x-nbdbackup-query-leftovers") == []
        assert [path.name for path in self.targets.iterdir()] == [self.increments.name]
        self.copying = None

    def _check_snapshots(self) -> None:
        assert self.qmp is not None
        listed = {str(info["export"]): info for info in self.qmp.ask("x-nbdbackup-query-snapshots")}
        assert listed.keys() <= self.taken.keys()
        for export, taken in list(self.taken.items()):
            info = listed.get(export)
            if info is None:
                assert taken.temporary or taken.dropping or not taken.promised, f"{export} is gone"
                del self.taken[export]
                continue
            assert not taken.temporary
            if info["state"] == "broken":
                assert taken.may_break, f"{export} is broken: {info['cause']}"
                taken.broken = True
            else:
                assert not taken.broken, f"{export} was broken, and is not any more"
                self._see(export, taken)
            taken.promised, taken.dropping = True, False
            taken.holds = str(info["bitmap"] or "")

    def _check_bitmaps(self) -> None:
        """Against the disk as it is."""
        assert self.qmp is not None
        content, chain = self.disk.read_bytes(), self.checkpoints()
        bitmaps = self._bitmaps()
        assert bitmaps.keys() - {PULLED, COPIED, MERGED} == set(chain)
        assert not [bitmap for bitmap in bitmaps.values() if bitmap.get("inconsistent")]
        held = {taken.holds for taken in self.taken.values()}
        assert {name for name, bitmap in bitmaps.items() if bitmap["busy"]} == held - {""}
        assert all(bitmap["recording"] for name, bitmap in bitmaps.items() if name not in chain[:-1])
        for index, name in enumerate(chain):
            self._check_backup(name, chain[index:], self.claims.get(name), content)
        for name in (PULLED, MERGED):
            if name in bitmaps:
                self._check_backup(name, [name], self.claims.get(name), content)
        if COPIED in bitmaps and self.increments_valid:
            self._check_backup(COPIED, [COPIED], self.increments.read_bytes(), content)

    def _bitmaps(self) -> dict[str, dict[str, object]]:
        """What is listed of each of the disk's; a successor, which has no name, left out."""
        assert self.qmp is not None
        listed = self.qmp.ask("query-named-block-nodes")[0].get("dirty-bitmaps", [])
        assert isinstance(listed, list)
        return {bitmap["name"]: bitmap for bitmap in listed if "name" in bitmap}

    def _check_backup(self, name: str, bitmaps: Sequence[str], backup: bytes | None, content: bytes) -> None:
        if backup is None:
            return  # killed before anybody had read it: there is no such backup
        changed = {
            number
            for number in range(GRANULES)
            if backup[number * GRANULE : (number + 1) * GRANULE]
            != content[number * GRANULE : (number + 1) * GRANULE]
        }
        dirty = set[int]().union(*(self._dirty(bitmap) for bitmap in bitmaps))
        assert changed <= dirty, f"{name}: {sorted(changed - dirty)} changed and are clean in {bitmaps}"
        self.done["bitmaps"] += 1
        self.done["clean granules"] += GRANULES - len(dirty)

    def _dirty(self, name: str) -> set[int]:
        command = (require("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}")
        try:
            extents = json.loads(run(*command, self.server.uri("disk")))
        except AssertionError as error:
            raise self.survives(error) from error
        return {
            number
            for extent in extents
            if extent["type"]
            for number in range(
                extent["offset"] // GRANULE, -(-(extent["offset"] + extent["length"]) // GRANULE)
            )
        }

    def _check_files(self) -> None:
        """Everything in the state directory belongs to something that is listed."""
        assert self.qmp is not None
        state = self.server.state_dir
        assert _names(state) <= {"bitmaps", "jobs", "lock", "partials", "scratch", "snapshots", "version"}
        assert _names(state / "partials") == _names(state / "jobs") == set()
        bitmaps = {f"disk:{name}.bitmap" for name in self._bitmaps()}
        assert _names(state / "bitmaps") - {"checkpoints.json"} == bitmaps
        sidecars = {name for name in _names(state / "snapshots") if name.endswith(".snapshot")}
        assert sidecars == {f"{export}.snapshot" for export in self.taken}
        copies = _names(state / "snapshots") - sidecars
        assert {name.rpartition(".bitmap")[0] for name in copies} <= sidecars
        scratch = [name.rsplit(".", 2)[0] for name in _names(state / "scratch")]
        assert len(scratch) == len(set(scratch))
        # Of one that is broken, a drop that was interrupted may have removed the scratch.
        whole = {export for export, taken in self.taken.items() if not taken.broken}
        assert whole <= set(scratch) <= self.taken.keys()


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()
