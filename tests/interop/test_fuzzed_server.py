"""Bytes of all kinds to a running `nbdbackup serve`: it stays up and small, and serves whoever is honest."""

import json
import select
import socket
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.conftest import ServeFunction
from tests.fuzz.corpus import inputs_of
from tests.fuzz.decoder import FuzzInput
from tests.fuzz.requests import SIZE, Mode, request_stream
from tests.fuzz.server_negotiation import negotiation_stream
from tests.support.disks import MIB, make_disk
from tests.support.nbd_wire import EXTENDED_HEADERS
from tests.support.raw_client import CMD_READ, OPT_GO, OPT_STRUCTURED_REPLY, REP_ACK, RawClient, go_data
from tests.support.server import Server

EXAMPLES = 150
MEMORY_GROWTH_BYTES_MAX = 64 * MIB
"""A session's buffers may stay allocated."""
LIMIT_S = 30.0
RECEIVED_BYTES_MAX = 256 * MIB
"""More than all answers to one client's stream can be."""

_AGREED_ON = {Mode.SIMPLE: (), Mode.STRUCTURED: (OPT_STRUCTURED_REPLY,), Mode.EXTENDED: (EXTENDED_HEADERS,)}


def talk(server: Server, data: bytes) -> None:
    """Be the client that `data` decodes to, until the server closes the connection."""
    source = FuzzInput(data)
    kind = source.below(4)
    with RawClient(server) as client:
        if kind == 0:
            stream = source.take(len(data))
        elif kind == 1:
            stream = negotiation_stream(source)
        else:
            mode = source.choose(tuple(Mode))
            client.greet()
            for option in _AGREED_ON[mode]:
                assert client.option(option)[-1].kind == REP_ACK
            assert client.option(OPT_GO, go_data("disk"))[-1].kind == REP_ACK
            stream = request_stream(source, mode)
        _exchange(client.socket, stream)


def _exchange(sock: socket.socket, stream: bytes) -> None:
    """Send `stream` and hang up on that side, reading all the while, until the server closes."""
    received, left = 0, memoryview(stream or b"\0")
    deadline = time.monotonic() + LIMIT_S
    try:
        while True:
            assert time.monotonic() < deadline, "the server holds on to a client that has left"
            readable, writable, _ = select.select([sock], [sock] if left else [], [], LIMIT_S)
            if writable:
                left = left[sock.send(left, socket.MSG_DONTWAIT) :]
                if not left:
                    sock.shutdown(socket.SHUT_WR)
            if readable:
                part = sock.recv(MIB)
                received += len(part)
                assert received <= RECEIVED_BYTES_MAX
                if not part:
                    return
    except ConnectionError:
        return


def read_honestly(server: Server) -> None:
    """The disk is served to a client that asks for it."""
    with RawClient(server) as client:
        assert client.go("disk") == SIZE
        client.request(CMD_READ, 4096, 8192)
        assert client.simple_reply(8192).error == 0


def check_log(server: Server) -> None:
    """Only events that an operator may read, one line each, and no failure of the server's own."""
    for line in server.log().splitlines():
        record = json.loads(line)
        assert record["level"] in ("info", "warning"), line
        assert "traceback" not in record
        assert len(record["message"].splitlines()) == 1


def test_no_bytes_from_clients_harm_the_server(tmp_path: Path, serve: ServeFunction) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", SIZE), options=["--log-format", "json"], tcp=False)
    read_honestly(server)
    memory = server.rss_bytes()
    # What reaches far into a session does so on a real one as well; see `talk` for the first bytes.
    known = [b"\2" + path.read_bytes()[:1] + path.read_bytes()[3:] for path in inputs_of("session")]
    known += [b"\1" + path.read_bytes()[2:] for path in inputs_of("negotiation")]

    @seed(20261123)
    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(st.binary(min_size=2, max_size=400) | st.sampled_from(known))
    def check(data: bytes) -> None:
        talk(server, data)
        read_honestly(server)

    check()
    assert server.rss_bytes() - memory <= MEMORY_GROWTH_BYTES_MAX
    assert server.process.poll() is None
    check_log(server)
