"""A snapshot whose scratch is full, as those see it who still read it: the cause, and no newer byte."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, allocated_bytes, make_disk
from tests.support.processes import wait_until
from tests.support.raw_client import CMD_READ, CMD_TRIM, CMD_WRITE, EIO, RawClient
from tests.support.server import Server

CLUSTER = 65536


@pytest.fixture
def broken(serve: ServeFunction, tmp_path: Path) -> Server:
    """A server whose snapshot disk@s1 broke when a client wrote more than its scratch takes."""
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB))
    server.cli("snapshot", "create", "disk", "--name", "s1", "--scratch-max", "64K")
    with RawClient(server) as client:
        client.go("disk")
        client.request(CMD_WRITE, 0, 2 * CLUSTER, b"n" * 2 * CLUSTER)
        assert client.simple_reply().error == 0
    return server


def test_error_of_a_read_says_why_the_snapshot_is_broken(broken: Server) -> None:
    """Defect j: the reader heard of EACCES and nothing more."""
    with RawClient(broken) as client:
        client.go("disk@s1", structured=True)
        client.request(CMD_READ, 5 * CLUSTER, CLUSTER)
        (chunk,) = client.chunks()
    assert chunk.error == EIO
    assert b"snapshot disk@s1 is broken: " in chunk.data
    assert b"is full: 65536 of 65536 bytes used (scratch-max)" in chunk.data
    assert "snapshot disk@s1 is broken, client writes go on: " in broken.log()


def test_no_byte_of_a_broken_snapshot_is_read_by_simple_replies(broken: Server) -> None:
    with RawClient(broken) as client:
        client.go("disk@s1")
        for offset in (0, CLUSTER, 5 * CLUSTER):
            client.request(CMD_READ, offset, CLUSTER)
            assert client.simple_reply(CLUSTER).error == EIO


def test_scratch_of_a_broken_snapshot_is_given_back_and_the_snapshot_is_still_listed(broken: Server) -> None:
    def scratch_files() -> list[str]:
        """Those that take room, with a name or without."""
        links = [link for link in Path(f"/proc/{broken.pid}/fd").iterdir() if link.is_symlink()]
        return [str(link) for link in links if "/scratch/" in os.readlink(link) and allocated_bytes(link) > 0]

    wait_until(lambda: not scratch_files(), "scratch takes no room")
    (listed,) = json.loads(broken.cli("snapshot", "list", "--json").stdout)
    assert (listed["export"], listed["state"], listed["scratch-used"]) == ("disk@s1", "broken", 0)
    with RawClient(broken) as client:
        client.go("disk@s1", structured=True)
        client.request(CMD_TRIM, 0, CLUSTER)
        client.chunk()
        client.request(CMD_READ, 0, CLUSTER)
        assert b"is full: 65536 of 65536 bytes used" in client.chunks()[-1].data
    broken.cli("snapshot", "drop", "disk@s1")
    assert broken.snapshots() == []
