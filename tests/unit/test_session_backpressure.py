"""A socket that is full one moment and has room the next: requests already received are still served."""

import socket

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.nbd.constants import Command
from nbdbackup.server import session as session_module
from nbdbackup.server.buffers import ReplyBuffer
from tests.support.sessions import export_of, serving

# Small, so that a whole batch of replies fits into the socket at the second try.
FLUSH_BYTES = 4096


async def test_requests_behind_a_full_socket_are_served_when_it_has_room_at_once_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really_send = ReplyBuffer.send
    refusals = [True]

    def send(replies: ReplyBuffer, sock: socket.socket) -> bool:
        if refusals and replies.used >= FLUSH_BYTES:
            refusals.pop()
            replies.is_blocked = True
            return False
        return really_send(replies, sock)

    monkeypatch.setattr(session_module, "REPLY_FLUSH_BYTES", FLUSH_BYTES)
    monkeypatch.setattr(ReplyBuffer, "send", send)
    async with serving(export_of(MemoryDevice(FLUSH_BYTES))) as served:
        client = served.client
        # In one piece, so that nothing arrives later that would wake the session.
        await client.send(b"".join(client.compose(Command.READ, 0, FLUSH_BYTES) for _ in range(8)))
        for cookie in range(1, 9):
            assert not (await client.reply(cookie)).error
    assert not refusals
