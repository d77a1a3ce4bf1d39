"""What a client can make the server hold, and for how long; who may connect at all."""

import asyncio
import errno
import ipaddress
import socket
import struct
from collections.abc import Callable

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import ProtocolError, UsageError
from nbdbackup.server import budget as budget_module
from nbdbackup.server import handshake as handshake_module
from nbdbackup.server import server as server_module
from nbdbackup.server import session as session_module
from nbdbackup.server.budget import FREE_BYTES, SharedBudget
from nbdbackup.server.exports import Export, ExportTable
from nbdbackup.server.handshake import Handshake
from nbdbackup.server.listener import adopt, is_allowed, listen_tcp, parse_range
from nbdbackup.server.server import Server
from nbdbackup.server.session import BYTES_MAX
from tests.support import nbd_wire as wire
from tests.support.gated import GatedDevice
from tests.support.nbd_session import FUA, LIMIT_S, READ, WRITE, connected, serving

MIB = 1 << 20


def table(device: MemoryDevice | GatedDevice) -> ExportTable:
    exports = ExportTable()
    exports.add(Export("disk", Node("disk", device)))
    return exports


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until `condition` holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - it is the loop itself that is waited for
            await asyncio.sleep(0)


class FakeHolder:
    def __init__(self) -> None:
        self.moved_bytes = 0
        self.woken = 0
        self.reason = ""

    def wake(self) -> None:
        self.woken += 1

    def disconnect(self, reason: str) -> None:
        self.reason = reason


async def test_budget_wakes_who_waits_when_there_is_room_again() -> None:
    budget = SharedBudget(100)
    one, other = FakeHolder(), FakeHolder()
    budget.hold(one, 60)
    assert not budget.is_full
    budget.hold(other, 60)
    assert budget.is_full
    budget.wait(one)
    budget.hold(other, 50)
    assert one.woken == 0
    budget.hold(other, 10)
    assert (one.woken, budget.used) == (1, 70)
    for holder in (one, other):
        budget.leave(holder)
    assert budget.used == 0


async def test_budget_ends_who_stands_still_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "STALL_S", 0.05)
    budget = SharedBudget(FREE_BYTES)
    stalled, small, waiting = FakeHolder(), FakeHolder(), FakeHolder()
    budget.hold(small, FREE_BYTES)
    budget.hold(stalled, FREE_BYTES + 1)
    budget.wait(waiting)
    await until(lambda: bool(stalled.reason))
    assert "moved 0 in" in stalled.reason
    assert not small.reason
    assert not waiting.reason
    for holder in (stalled, small, waiting):
        budget.leave(holder)


async def test_budget_ends_who_moves_a_byte_now_and_then_but_not_who_moves_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget_module, "STALL_S", 0.05)
    budget = SharedBudget(FREE_BYTES)
    dripping, slow, waiting = FakeHolder(), FakeHolder(), FakeHolder()
    budget.hold(dripping, 16 * FREE_BYTES)
    budget.hold(slow, 16 * FREE_BYTES)
    budget.wait(waiting)
    dripping.moved_bytes, slow.moved_bytes = FREE_BYTES - 1, FREE_BYTES
    await until(lambda: bool(dripping.reason))
    assert not slow.reason
    for holder in (dripping, slow, waiting):
        budget.leave(holder)


async def test_client_that_does_not_read_holds_a_bounded_amount_and_hinders_nobody() -> None:
    device = MemoryDevice(8 * MIB)
    device.data[:] = b"x" * len(device.data)
    async with (
        serving(table(device)) as server,
        connected(server, (wire.STRUCTURED_REPLY,)) as greedy,
        connected(server) as honest,
    ):
        for cookie in range(64):
            await greedy.request(READ, cookie, 0, 8 * MIB)
        sessions = [session for session in server._sessions if session._replies.is_blocked]
        await until(lambda: any(session._replies.is_blocked for session in server._sessions))
        for _ in range(100):
            assert (await honest.call(READ, 0, 4096)).data(0, 4096) == b"x" * 4096
        assert 0 < server._budget.used <= BYTES_MAX + 8 * MIB
        assert len(sessions) <= 1
    assert server._budget.used == 0


async def test_full_budget_stops_large_requests_but_not_small_ones() -> None:
    device = MemoryDevice(4 * MIB)
    async with serving(table(device)) as server, connected(server) as client:
        hog = FakeHolder()
        server._budget.hold(hog, server._budget.bytes_max)
        assert (await client.call(READ, 0, 4096)).error == 0
        assert (await client.call(WRITE, 0, 4096, FUA, bytes(4096))).error == 0
        await client.request(READ, 1, 0, 2 * MIB)
        await until(lambda: any(session._lacks_room for session in server._sessions))
        server._budget.leave(hog)
        assert (await client.reply(1, 2 * MIB)).error == 0


@pytest.mark.parametrize("options", [(), (wire.STRUCTURED_REPLY,), (wire.EXTENDED_HEADERS,)])
async def test_budget_that_is_always_short_delays_requests_and_loses_none(options: tuple[int, ...]) -> None:
    device = MemoryDevice(4 * MIB)
    device.data[:] = b"x" * len(device.data)
    lengths = [*[1536 << 10, 4096, 3 * MIB, 700 << 10] * 12, 512]
    async with serving(table(device)) as server:
        server._budget.bytes_max = 2 * MIB

        async def pull() -> None:
            async with connected(server, options) as client:
                for cookie, length in enumerate(lengths):
                    await client.request(READ, cookie, 0, length)
                    await client.request(WRITE, 1000 + cookie, 0, length, FUA, b"x" * length)
                left = {*range(len(lengths)), *range(1000, 1000 + len(lengths))}
                while left:
                    cookie, answer = await client.any_reply(0, lengths)
                    assert answer.error == 0
                    left.remove(cookie)

        async with asyncio.TaskGroup() as pulls:
            for _ in range(3):
                pulls.create_task(pull())
        assert server._budget.used == 0


async def test_request_behind_one_that_used_the_budget_up_is_served_without_another_event() -> None:
    device = MemoryDevice(4 * MIB)
    async with serving(table(device)) as server, connected(server) as client:
        server._budget.bytes_max = 2 * MIB
        read = struct.Struct(">IHHQQI")
        long = read.pack(0x25609513, 0, READ, 1, 0, 3 * MIB)
        await client.send(long + read.pack(0x25609513, 0, READ, 2, 0, 512))
        assert (await client.reply(1, 3 * MIB)).error == 0
        assert (await client.reply(2, 512)).error == 0


async def test_request_behind_a_long_write_in_place_is_served_without_another_event() -> None:
    device = MemoryDevice(4 * MIB)
    async with serving(table(device)) as server, connected(server) as client:
        server._budget.bytes_max = 2 * MIB
        header = struct.Struct(">IHHQQI")
        await client.send(header.pack(0x25609513, 0, WRITE, 1, 0, 4 * MIB) + b"z" * (4 * MIB - 1000))
        await until(lambda: device.data[3 * MIB] == ord("z"))
        # The write uses the budget up until it is finished, and nobody else is there to wake the session.
        await client.send(b"z" * 1000 + header.pack(0x25609513, 0, READ, 2, 0, 512))
        assert (await client.reply(1)).error == 0
        assert (await client.reply(2, 512)).data(0, 512) == b"z" * 512


async def test_payload_that_was_begun_counts_and_goes_on() -> None:
    device = MemoryDevice(4 * MIB)
    async with serving(table(device)) as server, connected(server) as client:
        await client.send(struct.pack(">IHHQQI", 0x25609513, FUA, WRITE, 5, 0, 4 * MIB) + bytes(1000))
        await until(lambda: server._budget.used == 4 * MIB)
        hog = FakeHolder()
        server._budget.hold(hog, server._budget.bytes_max)
        await client.send(b"y" * (4 * MIB - 1000))
        assert (await client.reply(5)).error == 0
        server._budget.leave(hog)


async def test_payload_that_is_thrown_away_takes_no_room_from_others() -> None:
    device = MemoryDevice(4 * MIB)
    async with serving(table(device)) as server, connected(server) as bad, connected(server) as client:
        await bad.send(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 5, 0, 0xFFFFFFFF) + bytes(100_000))
        await until(lambda: any(session._payload is not None for session in server._sessions))
        assert (await client.call(READ, 0, 2 * MIB)).error == 0
        assert server._budget.used == 0


async def test_stop_does_not_wait_for_ever_for_a_client_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "SHUTDOWN_TIMEOUT_S", 0.1)
    device = MemoryDevice(8 * MIB)
    device.data[:] = b"x" * len(device.data)
    async with serving(table(device)) as server, connected(server) as client:
        for cookie in range(8):
            await client.request(READ, cookie, 0, 8 * MIB)
        await until(lambda: any(session._replies.is_blocked for session in server._sessions))
        server.stop()
        await until(lambda: not server.client_count)


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\3IHAVE"])
async def test_09_handshake_that_does_not_get_on_ends(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake_module, "HANDSHAKE_TIMEOUT_S", 0.1)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        theirs.sendall(sent)
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(ProtocolError, match=r"no export chosen within 0\.1 s"):
                await Handshake(ours, ExportTable()).run()


@pytest.mark.parametrize(("allowed", "greeted"), [("127.0.0.0/8", True), ("10.0.0.0/8", False)])
async def test_only_allowed_addresses_get_a_greeting(allowed: str, greeted: bool) -> None:
    exports = table(MemoryDevice(MIB))
    listener = listen_tcp("127.0.0.1", 0)
    async with serving(exports, Server(exports, [listener], 0, [parse_range(allowed)])) as server:
        reader, writer = await asyncio.open_connection(*listener.sock.getsockname()[:2])
        async with asyncio.timeout(LIMIT_S):
            assert await reader.read(8) == (b"NBDMAGIC" if greeted else b"")
        writer.close()
        await writer.wait_closed()
        await until(lambda: not server.client_count)


@pytest.mark.parametrize(
    ("family", "address", "ranges", "expected"),
    [
        (socket.AF_INET, ("10.1.2.3", 1), [], True),
        (socket.AF_INET, ("10.1.2.3", 1), ["10.0.0.0/8"], True),
        (socket.AF_INET, ("11.1.2.3", 1), ["10.0.0.0/8", "11.1.2.3"], True),
        (socket.AF_INET, ("11.1.2.3", 1), ["10.0.0.0/8", "::/0"], False),
        (socket.AF_INET6, ("::1", 1, 0, 0), ["::1"], True),
        (socket.AF_INET6, ("::ffff:10.1.2.3", 1, 0, 0), ["10.0.0.0/8"], True),
        (socket.AF_INET6, ("fe80::1%eth0", 1, 0, 2), ["fe80::/10"], True),
        (socket.AF_INET6, ("2001:db8::1", 1, 0, 0), ["10.0.0.0/8"], False),
        (socket.AF_UNIX, "", ["10.0.0.0/8"], True),
    ],
)
def test_address_is_matched_against_every_range(
    family: int, address: tuple[object, ...] | str, ranges: list[str], expected: bool
) -> None:
    assert is_allowed(family, address, [parse_range(text) for text in ranges]) is expected


def test_range_may_be_an_address_inside_it_and_nothing_else() -> None:
    assert parse_range("10.1.2.3/8") == ipaddress.ip_network("10.0.0.0/8")
    for text in ("10.0.0.0/33", "localhost", "", "10.0.0"):
        with pytest.raises(UsageError, match="no address range"):
            parse_range(text)


def test_05_tcp_connections_have_no_delay_and_keepalive() -> None:
    with socket.socket() as sock:
        server_module._tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_only_a_listening_stream_socket_can_be_adopted() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as idle:
        for sock in (datagrams, idle):
            with pytest.raises(UsageError, match=rf"socket {sock.fileno()} \(nbd\) is no stream socket"):
                adopt(sock.fileno(), "nbd")
            assert sock.getsockname() == ("0.0.0.0", 0)  # still the caller's
    with pytest.raises(UsageError, match="cannot be used"):
        adopt(999, "")


def test_public_addresses_are_told_from_this_machine_s_own() -> None:
    for host, expected in (("127.0.0.1", False), ("::1", False), ("0.0.0.0", True)):
        try:
            listener = listen_tcp(host, 0)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # no IPv6 here
            raise
        assert listener.is_public is expected
        listener.close()
