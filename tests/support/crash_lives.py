"""Starting a server that may be killed while it starts, as often as a test likes."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nbdbackup.crash_points import VARIABLE
from tests.support.crash_world import SIZE, World
from tests.support.disks import make_disk
from tests.support.server import Server, ServerFailed


@contextmanager
def crashing_world(directory: Path, seed: int, options: Sequence[str]) -> Iterator[World]:
    """A world whose server was not started yet; stopped at the end, and looked at for tracebacks."""
    disk = make_disk(directory / f"{seed}.img", SIZE)
    server = Server({"disk": disk}, options, tcp=False, state_dir=directory / f"state-{seed}")
    world = World(server, disk, seed)
    try:
        yield world
        server.stop()
    except BaseException as error:
        error.add_note(f"--- log of nbdbackup serve\n{server.log()[-10000:]}")
        raise
    finally:
        if server.has_started:
            server.kill()
        server.close()
    world.close()


def start(server: Server, crash_point: str = "") -> bool:
    """Start it, to be killed at `crash_point` if that is not empty; False: that was while it started."""
    if server.has_started and server.process.stdout is not None:
        server.process.stdout.close()
    server.environment = {VARIABLE: crash_point} if crash_point else {}
    try:
        server.start()
    except ServerFailed:
        if server.process.returncode != -signal.SIGKILL:
            raise
        return False
    return True
