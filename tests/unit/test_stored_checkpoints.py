"""Checkpoints that outlive their server: stopped, or killed between any two steps of a change."""

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.block.file import FileDevice
from nbdbackup.daemon.chain_file import FILE_NAME
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps
from nbdbackup.errors import ConflictError, DeviceError
from nbdbackup.monitor.services_bitmaps import BitmapAdd
from nbdbackup.monitor.services_snapshots import CheckpointInfo, SnapshotOptions
from tests.support.daemon import Daemon, composed

GRANULE = 65536
SIZE = 16 * GRANULE
STEPS = ("rename", "replace", "unlink", "fsync", "fdatasync")
"""With a header's slot, everything that changes files, or their order."""


@asynccontextmanager
async def served(base: Path, directory: Path, *, power: bool = False) -> AsyncIterator[Daemon]:
    """A daemon with the disks `one` and `two` of `base`, and what is stored in `directory`."""
    async with composed(base, stored=StoredBitmaps(directory, power=power)) as daemon:
        for name in ("one", "two"):
            path = base / name
            if not path.exists():
                path.write_bytes(bytes(SIZE))
            daemon.add(name, FileDevice.open(str(path)), str(path))
            await daemon.bitmaps.load(daemon.graph.entry(name))
        yield daemon


async def write(daemon: Daemon, *numbers: int, node: str = "one") -> None:
    for number in numbers:
        await daemon.graph.get(node).write(number * GRANULE, b"x")


async def create(daemon: Daemon, name: str, *nodes: str) -> None:
    made = await daemon.checkpoints.create(nodes or ("one", "two"), SnapshotOptions(name=name))
    await daemon.snapshots.drop([info.export for info in made])


def listed(daemon: Daemon, node: str = "one") -> list[CheckpointInfo]:
    return [info for info in daemon.checkpoints.list() if info.node == node]


def names(daemon: Daemon, node: str = "one") -> list[str]:
    return [info.name for info in listed(daemon, node)]


def dirty(daemon: Daemon, *names: str) -> set[int]:
    """The granules of disk `one` that are dirty in any of its bitmaps called `names`."""
    bitmaps = [daemon.graph.entry("one").bitmaps.get(name) for name in names]
    return {
        granule
        for bitmap in bitmaps
        for run in bitmap.dirty_runs()
        for granule in range(run.offset // GRANULE, -(-(run.offset + run.length) // GRANULE))
    }


@contextmanager
def copied_before_each_step(directory: Path, copies: Path) -> Iterator[list[Path]]:
    """What a kill before each step that changes `directory` would leave of it, in the order of the steps."""
    made: list[Path] = []

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **more: object) -> object:
            made.append(copies / str(len(made)))
            shutil.copytree(directory, made[-1])
            return function(*arguments, **more)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(BitmapFile, "_store", watched(BitmapFile._store))
        yield made


async def check_after_crash(daemon: Daemon, since: dict[str, set[int]]) -> None:
    """The chain is whole and says what changed; `since` has that for each checkpoint there may be."""
    found = names(daemon)
    assert names(daemon, "two") == found
    assert {bitmap.name for bitmap in daemon.graph.entry("one").bitmaps} == set(found)
    assert all(not info.inconsistent for info in listed(daemon))
    await write(daemon, 15)
    for index, name in enumerate(found):
        assert since[name] | {15} <= dirty(daemon, *found[index:])
        bitmap = daemon.graph.entry("one").bitmaps.get(name)
        assert bitmap.enabled == (name == found[-1])
    assert [info.parent for info in listed(daemon)] == [None, *found][: len(found)]
    assert 14 not in dirty(daemon, *found)


@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
async def test_kill_in_the_middle_of_a_creation_leaves_a_whole_chain(tmp_path: Path, power: bool) -> None:
    directory = tmp_path / "bitmaps"
    (tmp_path / "copies").mkdir()
    async with served(tmp_path, directory, power=power) as daemon:
        await create(daemon, "c1")
        await write(daemon, 1)
        with copied_before_each_step(directory, tmp_path / "copies") as copies:
            await create(daemon, "c2")
    outcomes = []
    for copy in copies:
        async with served(tmp_path, copy) as daemon:
            outcomes.append(names(daemon))
            assert dirty(daemon, "c1") == {1}
            await check_after_crash(daemon, {"c1": {1}, "c2": set()})
            assert len(list(copy.glob("*.bitmap"))) == 2 * len(outcomes[-1])
            await create(daemon, "c9")
        async with served(tmp_path, copy) as daemon:
            assert names(daemon) == [*outcomes[-1], "c9"]
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (["c1"], ["c1", "c2"])


@pytest.mark.parametrize("gone", ["c1", "c2", "c3"])
@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
async def test_kill_in_the_middle_of_a_deletion_loses_no_bit(tmp_path: Path, gone: str, power: bool) -> None:
    directory = tmp_path / "bitmaps"
    (tmp_path / "copies").mkdir()
    async with served(tmp_path, directory, power=power) as daemon:
        for number in (1, 2, 3):
            await create(daemon, f"c{number}")
            await write(daemon, number)
        with copied_before_each_step(directory, tmp_path / "copies") as copies:
            await daemon.checkpoints.delete([], gone)
    outcomes = []
    for copy in copies:
        async with served(tmp_path, copy) as daemon:
            outcomes.append(names(daemon))
            await check_after_crash(daemon, {"c1": {1, 2, 3}, "c2": {2, 3}, "c3": {3}})
            assert len(list(copy.glob("*.bitmap"))) == 2 * len(outcomes[-1])
            assert len(await daemon.checkpoints.delete([], gone)) in (0, 2)
            assert await daemon.checkpoints.delete([], gone) == []
    rest = [name for name in ("c1", "c2", "c3") if name != gone]
    assert {tuple(outcome) for outcome in outcomes} == {("c1", "c2", "c3"), tuple(rest)}
    async with served(tmp_path, directory) as daemon:
        assert names(daemon) == rest


async def test_creation_whose_end_a_loss_of_power_takes_back_loses_no_write_made_since(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "bitmaps"
    (tmp_path / "copies").mkdir()
    async with served(tmp_path, directory, power=True) as daemon:
        await create(daemon, "c1")
        await write(daemon, 1)
        with copied_before_each_step(directory, tmp_path / "copies") as copies:
            await create(daemon, "c2")
        await write(daemon, 2)
        shutil.copytree(directory, tmp_path / "left")
    chains = [copy / FILE_NAME for copy in copies]
    announced = next(path for path in chains if b"making" in path.read_bytes())
    shutil.copy(announced, tmp_path / "left" / FILE_NAME)
    async with served(tmp_path, tmp_path / "left", power=True) as daemon:
        assert (names(daemon), dirty(daemon, "c1")) == (["c1"], {1, 2})
        await check_after_crash(daemon, {"c1": {1, 2}})


async def test_chain_with_its_uuids_and_times_is_there_after_a_restart(tmp_path: Path) -> None:
    async with served(tmp_path, tmp_path / "bitmaps") as daemon:
        await create(daemon, "c1")
        await create(daemon, "c2", "one")
        await write(daemon, 4)
        before = listed(daemon), listed(daemon, "two")
    async with served(tmp_path, tmp_path / "bitmaps") as daemon:
        assert (listed(daemon), listed(daemon, "two")) == before
        assert dirty(daemon, "c2") == {4}
        assert len({info.uuid for info in [*before[0], *before[1]]}) == 3
        with pytest.raises(ConflictError, match="already exists"):
            await create(daemon, "c2", "two", "one")
        assert (listed(daemon), listed(daemon, "two")) == before


async def test_creation_that_fails_leaves_nothing_on_disk(tmp_path: Path) -> None:
    directory = tmp_path / "bitmaps"
    async with served(tmp_path, directory) as daemon:
        await create(daemon, "c1")
        await write(daemon, 1)
        files = sorted(os.listdir(directory))
        (directory / f"{FILE_NAME}.new").mkdir()
        with pytest.raises(DeviceError, match=f"cannot write checkpoint file .*{FILE_NAME}"):
            await create(daemon, "c2")
        (directory / f"{FILE_NAME}.new").rmdir()
        assert sorted(os.listdir(directory)) == files
        await write(daemon, 2)
        assert (names(daemon), dirty(daemon, "c1")) == (["c1"], {1, 2})
        await create(daemon, "c2")


async def test_checkpoint_whose_bitmap_is_lost_says_so_and_a_new_one_begins_after_it(tmp_path: Path) -> None:
    directory = tmp_path / "bitmaps"
    async with served(tmp_path, directory) as daemon:
        for number in (1, 2, 3):
            await create(daemon, f"c{number}")
    (directory / "one:c2.bitmap").unlink()
    async with served(tmp_path, directory) as daemon:
        reason = "bitmap 'c2': its file is gone"
        assert [info.inconsistent for info in listed(daemon)] == [reason, reason, ""]
        assert [info.inconsistent for info in listed(daemon, "two")] == ["", "", ""]
        with pytest.raises(ConflictError, match="already exists"):
            await daemon.checkpoints.create(["one"], SnapshotOptions(name="c2"))
        await daemon.checkpoints.delete(["one"], "c2")
        assert [bool(info.inconsistent) for info in listed(daemon)] == [True, False]
        await daemon.checkpoints.delete(["one"], "c1")
        await create(daemon, "c4")
        await write(daemon, 3)
    async with served(tmp_path, directory) as daemon:
        assert [(info.name, info.inconsistent) for info in listed(daemon)] == [("c3", ""), ("c4", "")]
        assert dirty(daemon, "c4") == {3}


async def test_bitmap_of_another_making_does_not_pass_for_a_checkpoints(tmp_path: Path) -> None:
    directory = tmp_path / "bitmaps"
    async with served(tmp_path, directory) as daemon:
        await create(daemon, "c1")
        chain = (directory / FILE_NAME).read_bytes()
        await daemon.checkpoints.delete([], "c1")
        await create(daemon, "c1")
    (directory / FILE_NAME).write_bytes(chain)
    async with served(tmp_path, directory) as daemon:
        assert "not the one of the checkpoint" in listed(daemon)[0].inconsistent


async def test_disk_changed_behind_the_servers_back_needs_a_full_backup(tmp_path: Path) -> None:
    directory = tmp_path / "bitmaps"
    async with served(tmp_path, directory) as daemon:
        await create(daemon, "c1")
        await create(daemon, "c2")
    (tmp_path / "one").write_bytes(b"o" * SIZE)
    async with served(tmp_path, directory) as daemon:
        assert all("changed while no server recorded it" in info.inconsistent for info in listed(daemon))
        await create(daemon, "c3")
        await write(daemon, 7)
    async with served(tmp_path, directory) as daemon:
        assert [bool(info.inconsistent) for info in listed(daemon)] == [True, True, False]
        assert dirty(daemon, "c3") == {7}
        for name in ("c1", "c2"):
            await daemon.checkpoints.delete([], name)
    async with served(tmp_path, directory) as daemon:
        assert [(info.name, info.parent, info.inconsistent) for info in listed(daemon)] == [("c3", None, "")]


async def test_disk_that_grew_needs_a_full_backup(tmp_path: Path) -> None:
    directory = tmp_path / "bitmaps"
    async with served(tmp_path, directory) as daemon:
        await create(daemon, "c1")
    with (tmp_path / "one").open("r+b") as file:
        file.truncate(2 * SIZE)
    async with served(tmp_path, directory) as daemon:
        (info,) = listed(daemon)
        assert f"the disk was {SIZE} bytes long, and is {2 * SIZE} now" in info.inconsistent
        await create(daemon, "c2")
        assert [bool(info.inconsistent) for info in listed(daemon)] == [True, False]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"version":1', b'"version":2', "it is of version 2, and this nbdbackup knows version 1 alone"),
        (b'"name":"c1"', b'"name":"c9"', "it was damaged"),
        (b'"checkpoints"', b'"ch', "move it away"),
        (b"}", b"", "move it away"),
    ],
)
async def test_chain_file_that_is_not_understood_is_refused_and_left_alone(
    tmp_path: Path, old: bytes, new: bytes, reason: str
) -> None:
    directory = tmp_path / "bitmaps"
    async with served(tmp_path, directory) as daemon:
        await create(daemon, "c1")
    path = directory / FILE_NAME
    data = path.read_bytes().replace(old, new)
    path.write_bytes(data)
    stored = StoredBitmaps(directory, power=False)
    with pytest.raises(DeviceError, match=f"{FILE_NAME}: .*{reason}") as caught:
        async with composed(tmp_path, stored=stored):
            raise AssertionError("it was taken for good")
    assert "\n" not in str(caught.value)
    stored.close()
    assert path.read_bytes() == data


async def test_checkpoints_of_a_node_that_is_deleted_and_added_again_are_there_again(tmp_path: Path) -> None:
    async with served(tmp_path, tmp_path / "bitmaps") as daemon:
        await create(daemon, "c1")
        before = listed(daemon)
        daemon.exports.remove("one", "the test says so")
        await daemon.graph.delete("one")
        await create(daemon, "c2", "two")
        daemon.add("one", FileDevice.open(str(tmp_path / "one")))
        await daemon.bitmaps.load(daemon.graph.entry("one"))
        assert listed(daemon) == before


async def test_a_checkpoints_bitmap_is_not_a_users_after_a_restart_either(tmp_path: Path) -> None:
    async with served(tmp_path, tmp_path / "bitmaps") as daemon:
        await create(daemon, "c1")
    async with served(tmp_path, tmp_path / "bitmaps") as daemon:
        assert daemon.graph.entry("one").bitmaps.get("c1").checkpoint
        change = daemon.bitmaps.action(BitmapAdd("one", "c1", persistent=True))
        with pytest.raises(ConflictError, match="already exists: c1"):
            await change.ready()
