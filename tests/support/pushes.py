"""Backups that are to be interrupted: where they go, how they are started, and how they are looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.disks import MIB, make_sparse
from tests.support.foreign_servers import ForeignServer, nbdkit, qemu_nbd
from tests.support.processes import wait_until
from tests.support.qmp import execute
from tests.support.raw_client import CMD_READ, CMD_WRITE, RawClient
from tests.support.server import Server

SIZE = 8 * MIB + 4096
SLOW = MIB // 8
"""Bytes a second: a job that copied its first chunk does no more while the test lasts."""
SHAPES = ("new", "existing", "scratch", "nbdkit", "qemu-nbd")

Json = dict[str, object]


@dataclass
class Push:
    """A backup of "disk" that ends up in `image`; `arguments` are the command's beside the usual ones."""

    target: str
    image: Path
    remote: ForeignServer | None = None
    arguments: Json = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """Where a new file is made."""
        return Path(f"{self.image}.partial")

    def start(self, server: Server, **more: object) -> None:
        """Start the backup as job j, and wait until it has copied a little."""
        words: Json = {"node": "disk", "target": self.target, "sync": "full", "job_id": "j", "workers": 1}
        execute(server, "x-nbdbackup-backup", **{**words, "speed": SLOW, **self.arguments, **more})
        wait_until(lambda: progress(server) > 0, "the first chunk")


@contextmanager
def made_push(shape: str, directory: Path, size: int = SIZE) -> Iterator[Push]:
    """A push of one of SHAPES, with the server that it needs."""
    image = directory / "target.img"
    if shape == "new":
        yield Push(str(image), image)
        return
    if shape == "scratch":
        yield Push(str(image), image, arguments={"scratch": str(directory)})
        return
    make_sparse(image, size)
    if shape == "existing":
        yield Push(str(image), image, arguments={"existing": True})
        return
    command, export = (nbdkit("file", image), "") if shape == "nbdkit" else (qemu_nbd(image), "disk")
    with ForeignServer(command) as remote:
        yield Push(remote.uri(export), image, remote)


def jobs(server: Server) -> dict[str, Json]:
    """What query-jobs says, by the jobs' ids."""
    listed = execute(server, "query-jobs")
    assert isinstance(listed, list)
    return {job["id"]: job for job in listed}


def progress(server: Server) -> int:
    """How many bytes of job j are done."""
    done = jobs(server)["j"]["current-progress"]
    assert isinstance(done, int)
    return done


def restarted(server: Server, *options: str, environment: dict[str, str] | None = None) -> Server:
    """The same server once more, with the same disks and state; it is not running."""
    server.options = list(options)
    server.environment = environment or {}
    if server.process.stdout is not None:
        server.process.stdout.close()
    server.start()
    return server


def finish(server: Server) -> None:
    """Resume job j, let it run as fast as it can, and wait until it has succeeded."""
    execute(server, "block-job-set-speed", device="j", speed=0)
    execute(server, "job-resume", id="j")
    wait_over(server)


def wait_over(server: Server) -> None:
    """Wait until job j is dismissed, and so was no failure that stays listed."""
    wait_until(lambda: "j" not in jobs(server), "the end of job j")


def write(server: Server, offset: int, data: bytes) -> None:
    """One write to the disk, that is acknowledged on return."""
    with RawClient(server) as client:
        client.go("disk")
        client.request(CMD_WRITE, offset, len(data), data)
        assert client.simple_reply().error == 0


def read(server: Server, length: int) -> bytes:
    """The beginning of the disk."""
    with RawClient(server) as client:
        client.go("disk")
        client.request(CMD_READ, 0, length)
        reply = client.simple_reply(length)
        assert reply.error == 0
        return reply.data


def rest_of(server: Server) -> list[str]:
    """Every file that there is of jobs and their scratch, and of leftovers."""
    places = (server.state_dir / "jobs", server.state_dir / "scratch")
    found = [str(path) for place in places if place.exists() for path in place.iterdir()]
    leftovers = execute(server, "x-nbdbackup-query-leftovers")
    assert isinstance(leftovers, list)
    return sorted(found + [leftover["path"] for leftover in leftovers])
