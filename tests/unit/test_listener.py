"""Listening sockets: what is in the way is named, and nobody else's socket is taken or removed."""

import os
import socket
from pathlib import Path

import pytest

from nbdbackup.errors import ConflictError, DeviceError, UsageError
from nbdbackup.server.listener import listen_tcp, listen_unix
from tests.support.sessions import open_descriptors


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nbd.sock")


def can_connect(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def test_a_free_port_is_picked_and_told_in_the_uri() -> None:
    listener = listen_tcp("127.0.0.1", 0)
    try:
        port = listener.sock.getsockname()[1]
        assert listener.uri() == f"nbd://127.0.0.1:{port}"
        assert listener.uri("disk@s1") == f"nbd://127.0.0.1:{port}/disk%40s1"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    finally:
        listener.close()
    assert listener.uri() == f"nbd://127.0.0.1:{port}", "a snapshot can be listed while the server leaves"


def test_a_port_in_use_is_a_conflict_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        descriptors = open_descriptors()
        with pytest.raises(ConflictError, match=f"127.0.0.1:{port}: Address already in use; choose another"):
            listen_tcp("127.0.0.1", port)
        assert open_descriptors() == descriptors


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"192\.0\.2\.1:0: Cannot assign requested address"):
        listen_tcp("192.0.2.1", 0)


def test_a_name_that_means_no_address_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot listen on"):
        listen_tcp("no such host", 0)


def test_a_unix_socket_is_there_until_it_is_closed(path: str) -> None:
    listener = listen_unix(path)
    assert can_connect(path)
    assert listener.uri("disk") == f"nbd+unix:///disk?socket={path}"
    listener.close()
    assert not os.path.lexists(path)


def test_a_stale_socket_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = listen_unix(path)
    assert can_connect(path)
    listener.close()


def test_a_socket_that_somebody_listens_on_is_left_alone(path: str) -> None:
    listener = listen_unix(path)
    try:
        with pytest.raises(ConflictError, match="another server listens there"):
            listen_unix(path)
        assert can_connect(path)
    finally:
        listener.close()


def test_a_socket_whose_owner_is_too_busy_to_accept_is_left_alone(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        waiting = []
        try:
            for _ in range(3):
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                waiting.append(client)
                client.connect(path)
        except BlockingIOError:
            pass
        with pytest.raises(ConflictError, match="another server listens there"):
            listen_unix(path)
        for client in waiting:
            client.close()
    assert os.path.lexists(path)


def test_a_file_in_the_way_is_left_alone(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ConflictError, match="no socket is in the way"):
        listen_unix(path)
    assert Path(path).read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_a_usage_error(tmp_path: Path) -> None:
    descriptors = open_descriptors()
    with pytest.raises(UsageError, match="too long"):
        listen_unix(str(tmp_path / ("x" * 200)))
    assert open_descriptors() == descriptors


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="No such file or directory; choose another path"):
        listen_unix(str(tmp_path / "missing" / "nbd.sock"))


def test_closing_twice_does_not_remove_the_next_servers_socket(path: str) -> None:
    listener = listen_unix(path)
    listener.close()
    successor = listen_unix(path)
    try:
        listener.close()
        assert can_connect(path)
    finally:
        successor.close()
