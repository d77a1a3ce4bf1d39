"""Starting backups: what is refused has changed nothing, what is accepted is a job at once."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ConflictError, NbdBackupError, NotFoundError, UsageError
from nbdbackup.job.job import Job
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode, TargetPath
from nbdbackup.monitor.services_graph import FileNode, RawNode
from tests.support.daemon import Daemon, Leftovers, composed
from tests.support.fleecing import make_gate, noise, open_all_gates
from tests.support.gated import settle

SIZE = 3 * 65536 + 513
CONTENT = noise(SIZE)


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add_file("disk", tmp_path / "disk.img", CONTENT)
        yield daemon


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "backup.img"


def to_file(path: Path, *, existing: bool = False) -> BackupRequest:
    return BackupRequest("disk", TargetPath(str(path), existing), auto_dismiss=False)


def job_of(daemon: Daemon, job_id: str) -> Job:
    return daemon.jobs.get(job_id)


async def end(daemon: Daemon, job_id: str) -> str | None:
    """Wait for the job's end and dismiss it; its error."""
    job = job_of(daemon, job_id)
    async with asyncio.timeout(20):
        await job.wait_concluded()
    job.dismiss()
    return job.error


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize("scratch", ["none", "auto", "directory"])
async def test_a_backup_is_the_disk_as_it_was_when_it_was_accepted(
    scratch: str, daemon: Daemon, path: Path
) -> None:
    node = daemon.graph.get("disk")
    await node.flush()
    before = Leftovers(daemon.scratch)
    place = str(daemon.scratch) if scratch == "directory" else scratch
    for _ in range(3):
        job_id = await daemon.backups.start(replace(to_file(path), scratch=place))
        assert job_of(daemon, job_id).total_progress == SIZE
        await node.write(0, b"new" * 1000)
        assert await end(daemon, job_id) is None
        assert content_of(path) == CONTENT
        os.unlink(path)
        await node.write(0, CONTENT)
    assert daemon.is_quiet()
    await before.assert_none()


BASE = BackupRequest("disk", TargetPath("ignored"))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"node": "other"}, NotFoundError, "node-name='other'"),
        ({"workers": 0}, UsageError, "max-workers must be between 1 and 2147483647"),
        ({"workers": 1 << 31}, UsageError, "max-workers must be between 1 and 2147483647"),
        ({"cluster_bytes_min": 65537}, UsageError, "min-cluster-size needs to be a power of 2"),
        ({"cluster_bytes_min": 128 << 20}, UsageError, "min-cluster-size must not be more than 67108864"),
        ({"chunk_bytes_max": -1}, UsageError, "max-chunk must be zero"),
        ({"compress": True}, UsageError, "Compression is not supported for this drive /"),
        ({"discard_source": True}, UsageError, "discard-source would destroy data of node 'disk'"),
        ({"filter_node_name": "disk"}, ConflictError, "Could not create node: Duplicate nodes"),
        ({"filter_node_name": "0bad"}, UsageError, "Could not create node: Invalid node-name: '0bad'"),
        ({"chunk_bytes_max": 4096}, UsageError, "max-chunk"),
        ({"speed": -1}, UsageError, "non-negative"),
        ({"job_id": "0 bad"}, UsageError, "Invalid job ID"),
        ({"scratch": "/no/such/place"}, NotFoundError, "/no/such/place"),
        ({"target": TargetPath("relative.img")}, UsageError, "no absolute path"),
        ({"target": TargetPath("/no/such/place/backup.img")}, NotFoundError, "no directory"),
        ({"target": TargetPath("/no/such/place/backup.img", existing=True)}, NotFoundError, "does not exist"),
        ({"target": TargetNode("other")}, NotFoundError, "other"),
        ({"target": TargetNode("disk")}, UsageError, "cannot be the same"),
        ({"target": TargetNode("same")}, UsageError, "cannot be the same"),
        ({"target": TargetNode("read-only")}, ConflictError, "read-only"),
        ({"target": TargetNode("small")}, UsageError, "different sizes"),
    ],
)
async def test_what_is_refused_has_changed_nothing(
    daemon: Daemon,
    tmp_path: Path,
    path: Path,
    changes: dict[str, object],
    error: type[NbdBackupError],
    text: str,
) -> None:
    await daemon.graph.add(RawNode("same", "disk"))
    daemon.graph.insert("read-only", MemoryDevice(SIZE), "raw", "", True)
    daemon.graph.insert("small", MemoryDevice(SIZE - 1), "raw", "", False)
    before = Leftovers(tmp_path, daemon.scratch)
    request = replace(to_file(path), **changes)
    with pytest.raises(error, match=text):
        await daemon.backups.start(request)
    assert daemon.is_quiet()
    await before.assert_none()


@pytest.mark.parametrize("name", ["backup.img", "backup.img.partial"])
async def test_a_file_in_the_way_is_refused_and_left_alone(
    name: str, daemon: Daemon, path: Path, tmp_path: Path
) -> None:
    put(path.with_name(name), b"precious")
    before = Leftovers(tmp_path)
    with pytest.raises(ConflictError, match="exists already"):
        await daemon.backups.start(to_file(path))
    assert content_of(path.with_name(name)) == b"precious"
    assert daemon.is_quiet()
    await before.assert_none()


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link"])
async def test_a_disk_is_not_backed_up_onto_itself(
    way: str, existing: bool, daemon: Daemon, path: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    if way == "symbolic link":
        os.symlink(disk, path)
    elif way == "hard link":
        os.link(disk, path)
    else:
        path = disk
    before = Leftovers(tmp_path)
    with pytest.raises(UsageError, match="Source and target cannot be the same"):
        await daemon.backups.start(to_file(path, existing=existing))
    assert content_of(disk) == CONTENT
    assert daemon.is_quiet()
    await before.assert_none()


async def test_an_existing_target_of_another_size_is_left_alone(daemon: Daemon, path: Path) -> None:
    put(path, b"x" * (SIZE + 1))
    with pytest.raises(UsageError, match="different sizes"):
        await daemon.backups.start(to_file(path, existing=True))
    assert content_of(path) == b"x" * (SIZE + 1)
    assert daemon.is_quiet()


async def test_an_existing_target_is_overwritten_with_zeroes_too(
    daemon: Daemon, path: Path, tmp_path: Path
) -> None:
    daemon.add_file("sparse", tmp_path / "sparse.img", bytes(SIZE))
    os.truncate(tmp_path / "sparse.img", 0)
    os.truncate(tmp_path / "sparse.img", SIZE)
    put(path, b"\xff" * SIZE)
    job_id = await daemon.backups.start(replace(to_file(path, existing=True), node="sparse"))
    assert await end(daemon, job_id) is None
    assert content_of(path) == bytes(SIZE)


async def test_a_job_id_in_use_is_refused_and_its_job_goes_on(daemon: Daemon, path: Path) -> None:
    slow = replace(to_file(path), job_id="b1", speed=1, chunk_bytes_max=65536)
    await daemon.backups.start(slow)
    other = path.with_name("other.img")
    with pytest.raises(ConflictError, match="'b1' already in use"):
        await daemon.backups.start(replace(to_file(other), job_id="b1"))
    assert f"{other.name}.partial" not in os.listdir(path.parent)
    job_of(daemon, "b1").set_speed(0)
    assert await end(daemon, "b1") is None
    assert content_of(path) == CONTENT


def drained_slowly(daemon: Daemon, request: BackupRequest, count: int) -> "list[asyncio.Task[str]]":
    return [asyncio.get_running_loop().create_task(daemon.backups.start(request)) for _ in range(count)]


@pytest.mark.parametrize("job_id", [None, "b1"])
async def test_of_two_backups_to_one_file_at_once_one_is_refused(
    job_id: str | None, daemon: Daemon, path: Path, tmp_path: Path
) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("slow", gate)
    gate.kinds.add("write")
    writing = asyncio.ensure_future(node.write(0, b"x"))
    await gate.wait_pending("write")
    request = replace(to_file(path), node="slow", job_id=job_id)
    starting = drained_slowly(daemon, request, 2)
    await settle()
    gate.open_gate()
    results = await asyncio.gather(*starting, return_exceptions=True)
    await writing
    assert sorted(isinstance(result, ConflictError) for result in results) == [False, True]
    (accepted,) = [result for result in results if isinstance(result, str)]
    assert await end(daemon, accepted) is None
    assert path.name in os.listdir(tmp_path)
    assert daemon.is_quiet()


@pytest.mark.parametrize("scratch", ["none", "directory"])
async def test_a_start_that_is_cancelled_while_a_client_write_ends_leaves_nothing(
    scratch: str, daemon: Daemon, path: Path, tmp_path: Path
) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("slow", gate)
    gate.kinds.add("write")
    writing = asyncio.ensure_future(node.write(0, b"x"))
    await gate.wait_pending("write")
    before = Leftovers(tmp_path, daemon.scratch)
    place = str(daemon.scratch) if scratch == "directory" else scratch
    (starting,) = drained_slowly(daemon, replace(to_file(path), node="slow", scratch=place), 1)
    await settle()
    starting.cancel()
    await asyncio.wait([starting])
    await before.assert_none()
    gate.open_gate()
    await writing
    assert daemon.is_quiet()


@pytest.mark.parametrize("scratch", ["none", "directory"])
async def test_a_daemon_that_leaves_before_the_point_in_time_starts_no_backup(
    scratch: str, daemon: Daemon, path: Path, tmp_path: Path
) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("slow", gate)
    gate.kinds.add("write")
    writing = asyncio.ensure_future(node.write(0, b"x"))
    await gate.wait_pending("write")
    place = str(daemon.scratch) if scratch == "directory" else scratch
    request = replace(to_file(path), node="slow", scratch=place, job_id="b1")
    (starting,) = drained_slowly(daemon, request, 1)
    await settle()
    assert not list(daemon.jobs), "there is no job before there is a point in time"
    await daemon.jobs.cancel_all()
    gate.open_gate()
    with pytest.raises(ConflictError, match="shutting down"):
        await starting
    await writing
    assert path.name not in os.listdir(tmp_path)
    assert f"{path.name}.partial" not in os.listdir(tmp_path)
    assert daemon.is_quiet()


async def test_a_cancelled_backup_leaves_the_disk_writable_and_no_file(daemon: Daemon, path: Path) -> None:
    job_id = await daemon.backups.start(replace(to_file(path), speed=1, chunk_bytes_max=65536))
    job_of(daemon, job_id).cancel()
    assert await end(daemon, job_id) == "Operation canceled"
    await daemon.graph.get("disk").write(0, b"new")
    assert daemon.is_quiet()
    assert sorted(os.listdir(path.parent)) == ["disk.img", "scratch"]


async def test_leaving_cancels_a_backup_and_removes_its_file(tmp_path: Path, path: Path) -> None:
    before = Leftovers()
    async with composed(tmp_path) as daemon:
        daemon.add_file("disk", tmp_path / "disk.img", CONTENT)
        await daemon.backups.start(
            replace(to_file(path), speed=1, chunk_bytes_max=65536, scratch=str(daemon.scratch))
        )
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "scratch"]
    await before.assert_none()


# A node as the target.


async def test_a_node_can_be_the_target_of_one_backup_and_is_in_use_meanwhile(
    daemon: Daemon, tmp_path: Path
) -> None:
    put(tmp_path / "target.img", b"\xff" * SIZE)
    await daemon.graph.add(FileNode("target", str(tmp_path / "target.img")))
    request = BackupRequest(
        "disk", TargetNode("target"), speed=1, chunk_bytes_max=65536, job_id="b1", auto_dismiss=False
    )
    await daemon.backups.start(request)
    with pytest.raises(ConflictError, match="busy: block device is in use by block job: backup"):
        await daemon.graph.delete("target")
    busy = "Node 'target' is busy: block device is in use by block job: backup"
    with pytest.raises(ConflictError, match=busy):
        await daemon.backups.start(replace(request, job_id="b2"))
    with pytest.raises(ConflictError, match=busy):
        await daemon.backups.start(replace(request, node="target", target=TargetNode("disk"), job_id="b2"))
    with pytest.raises(ConflictError, match="in use"):
        await daemon.graph.delete("disk")
    job_of(daemon, "b1").set_speed(0)
    assert await end(daemon, "b1") is None
    assert content_of(tmp_path / "target.img") == CONTENT
    await daemon.graph.delete("target")
    assert daemon.is_quiet()
