"""A snapshot's view while clients change the very clusters that it is reading, request against request.

QEMU 7.2 was seen to return newer bytes, and zeroes where clients trimmed. QEMU 10 passes this check, and
stands beside us to show that it asks for nothing that cannot be had.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse
from tests.support.foreign_servers import ForeignServer, qemu_fleecing
from tests.support.newer_peers import newer
from tests.support.raw_client import (
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_ZEROES,
    Listening,
    RawClient,
)

CLUSTER = 65536
SIZE = 32 * MIB
AT_ONCE = 12
"""Clusters in one round: with two reads of each, the view's connection has more in flight than QEMU takes."""
CHANGES = (CMD_WRITE, CMD_WRITE, CMD_TRIM, CMD_ZEROES)
OFFSET_DATA, OFFSET_HOLE = 1, 2
MakeView = Callable[[ServeFunction, Path], AbstractContextManager[Listening]]


@contextmanager
def our_view(serve: ServeFunction, directory: Path) -> Iterator[Listening]:
    """Our server; "disk" and "disk@s1" are its exports."""
    server = serve(disk=make_disk(directory / "disk.img", SIZE))
    server.cli("snapshot", "create", "disk", "--name", "s1")
    yield server


@contextmanager
def qemus_view(serve: ServeFunction, directory: Path) -> Iterator[Listening]:
    """Debian 13's QEMU with the same two exports."""
    image, scratch = make_disk(directory / "disk.img", SIZE), make_sparse(directory / "scratch.img", SIZE)
    with ForeignServer(qemu_fleecing(image, scratch, newer("qemu-storage-daemon"))) as server:
        yield server


def send_reads(view: RawClient, clusters: Sequence[int], first_cookie: int) -> None:
    """Ask for each whole cluster."""
    for number, cluster in enumerate(clusters):
        view.request(CMD_READ, cluster * CLUSTER, CLUSTER, cookie=first_cookie + number)


def send_changes(live: RawClient, generator: random.Random, clusters: Sequence[int]) -> None:
    """Change some or all of each cluster, a little of its neighbours at times."""
    for cookie, cluster in enumerate(clusters):
        start = cluster * CLUSTER + generator.choice([0, 0, 4096, -4096 if cluster else 0])
        length = min(generator.choice([4096, CLUSTER, CLUSTER]), SIZE - start)
        command = generator.choice(CHANGES)
        data = bytes([0xEE]) * length if command == CMD_WRITE else b""
        live.request(command, start, length, data, cookie=cookie)


def received(view: RawClient, structured: bool, count: int) -> dict[int, bytes]:
    """What `count` reads of a cluster each returned, by cookie."""
    if not structured:
        replies = [view.simple_reply(CLUSTER) for _ in range(count)]
        assert not any(reply.error for reply in replies)
        return {reply.cookie: reply.data for reply in replies}
    buffers: dict[int, bytearray] = {}
    ended = 0
    while ended < count:
        chunk = view.chunk()
        assert not chunk.error, chunk
        buffer = buffers.setdefault(chunk.cookie, bytearray(b"\xdd" * CLUSTER))
        ended += chunk.flags & 1
        if chunk.kind == OFFSET_DATA:
            put(buffer, chunk.data[:8], chunk.data[8:])
        elif chunk.kind == OFFSET_HOLE:
            put(buffer, chunk.data[:8], bytes(struct.unpack_from(">I", chunk.data, 8)[0]))
    return {cookie: bytes(buffer) for cookie, buffer in buffers.items()}


def put(buffer: bytearray, offset: bytes, content: bytes) -> None:
    """Place `content`, which is at big-endian `offset` of the disk, in the buffer of its cluster."""
    position = int.from_bytes(offset, "big") % CLUSTER
    buffer[position : position + len(content)] = content


def forget_cached(disk: Path) -> None:
    """Reads of `disk` take their time again, so that changes can get in their way."""
    with disk.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wrong_reads(server: Listening, structured: bool, disk: Path) -> int:
    """Race reads of the view against changes, cluster by cluster; how many did not see the point in time."""
    expected = disk.read_bytes()
    generator = random.Random(3)
    clusters = list(range(SIZE // CLUSTER))
    generator.shuffle(clusters)
    wrong = 0
    with RawClient(server) as live, RawClient(server) as view:
        live.go("disk")
        view.go("disk@s1", structured=structured)
        for start in range(0, len(clusters), AT_ONCE):
            batch = clusters[start : start + AT_ONCE]
            forget_cached(disk)
            send_reads(view, batch, 0)
            send_changes(live, generator, batch)
            send_reads(view, batch, len(batch))
            for cookie, content in received(view, structured, 2 * len(batch)).items():
                offset = batch[cookie % len(batch)] * CLUSTER
                wrong += content != expected[offset : offset + CLUSTER]
            for _ in batch:
                assert live.simple_reply().error == 0
    return wrong


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("of", [our_view, qemus_view], ids=["ours", "qemu-10"])
def test_reads_of_a_view_race_overlapping_writes_trims_and_zeroes_and_see_their_instant(
    serve: ServeFunction,
    tmp_path: Path,
    of: MakeView,
    structured: bool,
) -> None:
    with of(serve, tmp_path) as server:
        assert wrong_reads(server, structured, tmp_path / "disk.img") == 0
