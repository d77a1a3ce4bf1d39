"""The control socket: conversation, many clients, events, and the socket file's life."""

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path

import pytest

from nbdbackup.errors import ConflictError, UsageError
from nbdbackup.job.events import Event
from nbdbackup.monitor import server as monitor_server
from nbdbackup.monitor.framing import MESSAGE_BYTES_MAX
from nbdbackup.monitor.server import CLIENTS_MAX
from tests.support.jobs import WAIT_S_MAX, settle
from tests.support.monitor import bench


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


async def test_only_qmp_capabilities_is_heard_before_negotiation(path: Path) -> None:
    async with bench(path) as control, control.connected(negotiate=False) as client:
        refusal = ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        assert await client.fail("query-version") == refusal
        assert await client.fail("no-such-command") == refusal
        assert await client.fail("qmp_capabilities", {"enable": ["oob"]}) == (
            "GenericError",
            "Capability oob not available",
        )
        assert await client.fail("qmp_capabilities", {"enable": True}) == (
            "GenericError",
            "Invalid parameter type for 'enable', expected: array",
        )
        assert await client.fail("query-version") == refusal
        assert await client.execute("qmp_capabilities") == {}
        assert await client.fail("qmp_capabilities") == (
            "CommandNotFound",
            "Capabilities negotiation is already complete, command ignored",
        )


async def test_unknown_command_is_told_by_name(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        assert await client.fail("fly") == ("CommandNotFound", "The command fly has not been found")


@pytest.mark.parametrize("sent_id", [0, "x", None, {"a": [1]}, [False]])
async def test_id_comes_back_with_results_and_errors(path: Path, sent_id: object) -> None:
    async with bench(path) as control, control.connected() as client:
        for execute in ("query-jobs", "nonsense", 5):
            answer = await client.ask({"execute": execute, "id": sent_id})  # type: ignore[dict-item]
            assert answer["id"] == sent_id
        assert "id" not in await client.ask({"execute": "query-jobs"})


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([1], "QMP input must be a JSON object"),
        ("x", "QMP input must be a JSON object"),
        ({}, "QMP input lacks member 'execute'"),
        ({"exec": "query-jobs"}, "QMP input member 'exec' is unexpected"),
        ({"exec-oob": "query-jobs"}, "QMP input member 'exec-oob' is unexpected"),
        ({"execute": 5}, "QMP input member 'execute' must be a string"),
        ({"execute": "query-jobs", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "query-jobs", "arguments": {"x": 1}}, "Parameter 'x' is unexpected"),
    ],
)
async def test_malformed_message_is_refused_and_the_next_one_served(
    path: Path, message: dict[str, int], text: str
) -> None:
    async with bench(path) as control, control.connected() as client:
        assert await client.ask(message) == {"error": {"class": "GenericError", "desc": text}}
        assert await client.execute("query-jobs") == []


async def test_garbage_is_refused_and_the_next_message_served(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        await client.send_bytes(b"GET / HTTP/1.1\r\n")
        await client.send_bytes(b'{"execute": "query-jobs", "id": "after"}')
        while (answer := await client.receive_answer()).get("id") != "after":
            assert "error" in answer
        assert answer["return"] == []


async def test_commands_of_one_chunk_are_answered_in_order(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        count = 200
        await client.send_bytes(b"".join(b'{"execute":"query-jobs","id":%d}' % n for n in range(count)))
        assert [(await client.receive_answer())["id"] for _ in range(count)] == list(range(count))


async def test_endless_message_ends_its_client_alone(path: Path) -> None:
    async with bench(path) as control, control.connected() as bad, control.connected() as good:
        await bad.send_bytes(b'"' + b"x" * (MESSAGE_BYTES_MAX + 1))
        answer = await bad.receive_answer()
        assert answer["error"] == {"class": "GenericError", "desc": "JSON token size limit exceeded"}
        assert await bad.receive() is None
        assert await good.execute("query-jobs") == []


async def test_bug_in_a_command_is_logged_and_the_conversation_goes_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(path) as control, control.connected() as client:
        control.backups.failure = ZeroDivisionError("oops")
        arguments = {"node": "disk", "target": "/t", "sync": "full"}
        error_class, text = await client.fail("x-nbdbackup-backup", arguments)
        assert error_class == "GenericError"
        assert text.startswith("internal error: ZeroDivisionError: oops")
        assert await client.execute("query-jobs") == []
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None


async def test_failure_of_the_system_is_one_line(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        control.backups.failure = FileNotFoundError(2, "No such file or directory", "/no/where")
        arguments = {"node": "disk", "target": "/no/where", "sync": "full"}
        assert await client.fail("x-nbdbackup-backup", arguments) == (
            "GenericError",
            "/no/where: No such file or directory",
        )


async def test_events_reach_every_negotiated_client_with_a_time_stamp(path: Path) -> None:
    async with (
        bench(path) as control,
        control.connected() as one,
        control.connected() as two,
        control.connected(negotiate=False) as silent,
    ):
        control.server.publish(Event("SHUTDOWN", {"guest": False}))
        for client in (one, two):
            event = await client.wait_event("SHUTDOWN")
            assert event["data"] == {"guest": False}
            stamp = event["timestamp"]
            assert isinstance(stamp, dict)
            assert stamp["seconds"] > 1_700_000_000
            assert 0 <= stamp["microseconds"] < 1_000_000
        assert await silent.execute("qmp_capabilities") == {}
        assert silent.events == []


async def test_client_that_does_not_read_is_dropped_and_others_get_their_events(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor_server, "UNREAD_BYTES_MAX", 10_000)
    async with bench(path) as control, control.connected() as reader:
        deaf_reader, deaf_writer = await asyncio.open_unix_connection(path, limit=1)
        deaf_writer.write(b'{"execute":"qmp_capabilities"}')
        async with asyncio.timeout(WAIT_S_MAX):
            await deaf_reader.readexactly(1)
            count = 0
            while "does not read" not in caplog.text:
                control.server.publish(Event("NOISE", {"text": "x" * 1000}))
                count += 1
                await settle()
                await reader.wait_event("NOISE")
        assert count < 10_000
        assert await reader.execute("query-jobs") == []
        deaf_writer.close()


async def test_client_that_hangs_up_in_a_command_lets_it_end(path: Path) -> None:
    async with bench(path) as control, control.connected() as watcher:
        async with control.connected() as client:
            await client.send_bytes(
                b'{"execute":"x-nbdbackup-backup","arguments":{"node":"disk","target":"/t","sync":"full"}}'
            )
        assert (await watcher.wait_event("JOB_STATUS_CHANGE"))["data"] == {
            "id": "backup-1",
            "status": "created",
        }
        assert [job.id for job in control.jobs] == ["backup-1"]


async def test_clients_are_bounded(path: Path) -> None:
    async with bench(path):
        streams = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS_MAX)]
        async with asyncio.timeout(WAIT_S_MAX):
            for reader, _ in streams:
                assert await reader.readline()
            reader, writer = await asyncio.open_unix_connection(path)
            assert await reader.read() == b""
            writer.close()
            for _, writer in streams:
                writer.close()


async def test_socket_is_for_its_owner_alone_and_gone_at_the_end(path: Path) -> None:
    async with bench(path):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        assert stat.S_ISSOCK(os.lstat(path).st_mode)
    with pytest.raises(FileNotFoundError):
        os.lstat(path)


async def test_socket_left_behind_by_a_dead_server_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    async with bench(path) as control, control.connected() as client:
        assert await client.execute("query-jobs") == []


async def _refused(path: Path) -> Exception:
    with pytest.raises(ExceptionGroup) as caught:
        async with bench(path):
            pass
    (error,) = caught.value.exceptions
    return error


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


def _read(path: Path) -> str:
    return path.read_text()


async def test_second_server_on_the_same_socket_is_refused_and_the_first_goes_on(path: Path) -> None:
    async with bench(path) as control:
        error = await _refused(path)
        assert isinstance(error, ConflictError)
        assert str(path) in str(error)
        async with control.connected() as client:
            assert await client.execute("query-jobs") == []


async def test_other_file_in_the_way_is_left_alone(path: Path) -> None:
    _write(path, "precious")
    error = await _refused(path)
    assert isinstance(error, ConflictError)
    assert _read(path) == "precious"


async def test_path_too_long_for_a_socket_is_refused_clearly(tmp_path: Path) -> None:
    error = await _refused(tmp_path / ("x" * 120))
    assert isinstance(error, UsageError)
    assert "too long" in str(error)


async def test_socket_of_a_successor_is_not_removed(path: Path) -> None:
    async with bench(path):
        _write(path, "another's")
    assert _read(path) == "another's"


async def test_clients_are_let_go_at_the_end(path: Path) -> None:
    async with bench(path) as control:
        reader, writer = await asyncio.open_unix_connection(control.path)
        assert await reader.readline()
    async with asyncio.timeout(WAIT_S_MAX):
        assert await reader.read() == b""
    writer.close()
