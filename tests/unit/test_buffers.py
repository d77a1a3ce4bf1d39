"""The two buffers of a session, over a socket pair: no byte lost, none twice, none out of order."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.server.buffers import RECEIVE_BYTES, REPLY_BYTES, REPLY_FLUSH_BYTES, ReceiveBuffer, ReplyBuffer
from tests.support.fleecing import noise

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def drain(sock: socket.socket) -> bytes:
    received = b""
    try:
        while data := sock.recv(1 << 20):
            received += data
    except BlockingIOError:
        pass
    return received


def test_what_is_not_used_stays_in_order_when_the_buffer_wraps(pair: Pair) -> None:
    ours, theirs = pair
    buffer, used = ReceiveBuffer(), b""
    stream = noise(3 * RECEIVE_BYTES)
    position = 0
    while len(used) < len(stream):
        try:
            position += theirs.send(stream[position : position + 70_000])
        except BlockingIOError:
            pass
        try:
            buffer.receive(ours)
        except BlockingIOError:
            pass
        # Always leave some, as a head that has not arrived as a whole does.
        keep = 27 if position < len(stream) else 0
        count = max(0, len(buffer) - keep)
        used += buffer.view[buffer.start : buffer.start + count]
        buffer.consume(count)
    assert used == stream


def test_the_end_of_the_stream_is_told_from_nothing_there(pair: Pair) -> None:
    ours, theirs = pair
    buffer = ReceiveBuffer()
    with pytest.raises(BlockingIOError):
        buffer.receive(ours)
    theirs.send(b"last")
    theirs.close()
    assert buffer.receive(ours) == 4
    assert buffer.receive(ours) == 0
    assert bytes(buffer.view[buffer.start : buffer.end]) == b"last"


def test_bytes_from_elsewhere_come_before_those_of_the_socket(pair: Pair) -> None:
    ours, theirs = pair
    buffer = ReceiveBuffer()
    buffer.put(b"first")
    theirs.send(b"second")
    buffer.receive(ours)
    assert bytes(buffer.view[buffer.start : buffer.end]) == b"firstsecond"


def test_a_batch_leaves_in_order(pair: Pair) -> None:
    ours, theirs = pair
    replies = ReplyBuffer()
    for index in range(10):
        replies.put(b"%d" % index)
    assert not replies.is_empty
    assert replies.send(ours)
    assert replies.is_empty
    assert drain(theirs) == b"0123456789"


def test_nothing_joins_a_batch_that_is_on_its_way(pair: Pair) -> None:
    ours, theirs = pair
    replies = ReplyBuffer()
    large = noise(REPLY_FLUSH_BYTES)
    while replies.has_room(len(large)):
        replies.put(large)
    batch_bytes = replies.used
    assert not replies.send(ours)
    assert replies.is_blocked
    assert not replies.has_room(1)
    replies.put(b"later")
    assert replies.used == batch_bytes
    received = drain(theirs)
    while not replies.send(ours):
        received += drain(theirs)
    received += drain(theirs)
    assert received == large * (batch_bytes // len(large)) + b"later"
    assert replies.has_room(REPLY_BYTES)


def test_a_reply_too_large_for_a_batch_is_sent_whole(pair: Pair) -> None:
    ours, theirs = pair
    replies = ReplyBuffer()
    huge = noise(5 * REPLY_BYTES)
    replies.put(huge)
    received = b""
    while not replies.send(ours):
        received += drain(theirs)
    assert received + drain(theirs) == huge


def test_a_connection_that_is_gone_is_an_error(pair: Pair) -> None:
    ours, theirs = pair
    replies = ReplyBuffer()
    replies.put(b"reply")
    theirs.close()
    with pytest.raises(BrokenPipeError):
        replies.send(ours)


@given(
    steps=st.lists(
        st.one_of(st.integers(1, 2000), st.just(300_000), st.just(0), st.just(-1)), min_size=1, max_size=40
    )
)
def test_every_reply_arrives_whole_and_once(steps: list[int]) -> None:
    """A number is a reply of that length; 0 sends; -1 reads what the client was sent."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        replies, received, put = ReplyBuffer(), b"", []
        for index, step in enumerate(steps):
            if step > 0:
                # Length, number and filling: order is free, wholeness is not.
                reply = step.to_bytes(4, "big") + index.to_bytes(4, "big") + bytes([index]) * step
                put.append(reply)
                replies.put(reply)
            elif step == 0:
                replies.send(ours)
            else:
                received += drain(theirs)
        while not replies.send(ours):
            received += drain(theirs)
        received += drain(theirs)
    found = []
    while received:
        length = 8 + int.from_bytes(received[:4], "big")
        found.append(received[:length])
        received = received[length:]
    assert sorted(found) == sorted(put)
