"""Stock QMP clients work unmodified, and qemu-storage-daemon says the same as we do."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdbackup.job.events import Json
from tests.conftest import ServeFunction
from tests.support.jobs import WAIT_S_MAX
from tests.support.monitor import QmpClient, bench
from tests.support.peers import require

DISK_BYTES = 4 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


async def test_qmp_client_runs_commands_and_gets_events(path: Path) -> None:
    async with bench(path) as control:
        client = QMPClient("test")
        async with asyncio.timeout(WAIT_S_MAX):
            await client.connect(str(path))
            with client.listener(names={"BLOCK_JOB_COMPLETED"}) as listener:
                arguments: dict[str, object] = {"node": "disk", "target": "/t", "sync": "full", "job-id": "j"}
                assert await client.execute("x-nbdbackup-backup", arguments) == {"job-id": "j"}
                control.backups.started[0].step()
                event = await listener.get()
                assert event["event"] == "BLOCK_JOB_COMPLETED"
            with pytest.raises(ExecuteError, match="Job not found"):
                await client.execute("job-cancel", {"id": "nope"})
            await client.disconnect()


async def test_qmp_shell_runs_commands(path: Path) -> None:
    async with bench(path) as control:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "qemu.qmp.qmp_shell",
            str(path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"HOME": str(path.parent), "TERM": "dumb"},
        )
        commands = (
            b"query-version\n"
            b'x-nbdbackup-snapshot-create nodes=["disk"] name=s1\n'
            b"x-nbdbackup-query-snapshots\n"
            b"job-cancel id=nope\n"
        )
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                output, _ = await process.communicate(commands)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        text = output.decode()
        assert process.returncode == 0, text
        assert text.count("disk@s1") == 2, text
        assert "Job not found" in text, text
        assert [info.export for info in control.snapshots.infos] == ["disk@s1"]


@asynccontextmanager
async def qemu(directory: Path) -> AsyncIterator[QmpClient]:
    """A client of a qemu-storage-daemon with two nodes, `disk` and `target`."""
    path = directory / "qemu.sock"
    nodes: list[str] = []
    for name in ("disk", "target"):
        image = directory / f"{name}.img"
        await asyncio.to_thread(image.write_bytes, b"\1" * DISK_BYTES)
        nodes += ["--blockdev", f"driver=file,node-name={name},filename={image}"]
    process = await asyncio.create_subprocess_exec(
        require("qemu-storage-daemon"),
        *("--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"),
        *nodes,
    )
    try:
        reader, writer = await _connect(path)
        client = QmpClient(reader, writer)
        await client.receive()
        try:
            yield client
        finally:
            writer.close()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            try:
                return await asyncio.open_unix_connection(path)
            except OSError:
                await asyncio.sleep(0.02)


BAD_MESSAGES: list[Json] = [
    [1],
    "text",
    5,
    None,
    {},
    {"exec": "query-version"},
    {"execute": 5},
    {"execute": None},
    {"execute": "query-version", "arguments": 5},
    {"execute": "query-version", "arguments": None},
    {"execute": "query-version", "control": {}},
    {"execute": "query-version", "arguments": {"x": 1}},
    {"execute": "no-such-command", "arguments": {"x": 1}, "id": 7},
    {"execute": "qmp_capabilities", "id": [1, {"a": None}]},
]
BAD_ARGUMENTS: list[tuple[str, dict[str, Json]]] = [
    ("job-cancel", {}),
    ("job-cancel", {"id": None}),
    ("job-cancel", {"id": 5}),
    ("job-cancel", {"id": ["x"]}),
    ("job-cancel", {"id": "nope"}),
    ("job-cancel", {"id": "nope", "force": True}),
    ("job-pause", {"device": "nope"}),
    ("job-pause", {"id": "nope"}),
    ("job-resume", {"id": "nope"}),
    ("job-complete", {"id": "nope"}),
    ("job-finalize", {"id": "nope"}),
    ("job-dismiss", {"id": "nope"}),
    ("block-job-cancel", {"device": "nope"}),
    ("block-job-cancel", {"device": "nope", "force": 1}),
    ("block-job-pause", {"device": "nope"}),
    ("block-job-resume", {"device": "nope"}),
    ("block-job-complete", {"device": "nope"}),
    ("block-job-finalize", {"id": "nope"}),
    ("block-job-dismiss", {"id": "nope"}),
    ("block-job-set-speed", {"device": "nope", "speed": 1}),
    ("block-job-set-speed", {"device": "nope", "speed": "1"}),
    ("block-job-set-speed", {"device": "nope", "speed": 1.5}),
    ("block-job-set-speed", {"device": "nope", "speed": 1 << 64}),
    ("block-job-set-speed", {"device": "nope"}),
    ("blockdev-backup", {}),
    ("blockdev-backup", {"device": 1}),
    ("blockdev-backup", {"device": "disk", "target": "target"}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "foo"}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": 5}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "x": 1}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "speed": "x"}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "auto-finalize": 1}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "x-perf": 4}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "x-perf": None}),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "x-perf": {"z": 1}}),
    (
        "blockdev-backup",
        {"device": "disk", "target": "target", "sync": "full", "x-perf": {"max-workers": "x"}},
    ),
    ("blockdev-backup", {"device": "disk", "target": "target", "sync": "full", "job-id": "1bad"}),
    ("blockdev-add", {}),
    ("blockdev-add", {"driver": "floppy9", "node-name": "c"}),
    ("blockdev-add", {"driver": "file", "node-name": "c"}),
    ("blockdev-add", {"driver": "file", "node-name": "c", "filename": 5}),
    ("blockdev-add", {"driver": "file", "node-name": "c", "filename": "/x", "zz": 3}),
    ("blockdev-add", {"driver": "file", "node-name": "c", "filename": "/x", "discard": "x"}),
    ("blockdev-add", {"driver": "file", "node-name": "c", "filename": "/x", "read-only": "yes"}),
    ("blockdev-add", {"driver": "raw", "node-name": "c"}),
    ("blockdev-add", {"driver": "raw", "file": "disk"}),
    ("blockdev-add", {"driver": "raw", "node-name": "c", "file": 5}),
    ("blockdev-add", {"driver": "raw", "node-name": "c", "file": {"driver": "file"}}),
    ("blockdev-add", {"driver": "raw", "node-name": "c", "file": {"driver": "file", "filename": 5}}),
    ("blockdev-del", {}),
    ("blockdev-del", {"node-name": 5}),
    ("query-named-block-nodes", {"flat": "a"}),
    ("query-jobs", {"x": 1}),
    ("quit", {"x": 1}),
    ("transaction", {}),
    ("transaction", {"actions": {}}),
    ("transaction", {"actions": [1]}),
    ("transaction", {"actions": [{}]}),
    ("transaction", {"actions": [{"type": "abort"}]}),
    ("transaction", {"actions": [{"data": {}}]}),
    ("transaction", {"actions": [{"type": 5, "data": {}}]}),
    ("transaction", {"actions": [{"type": "nope", "data": {}}]}),
    ("transaction", {"actions": [{"type": "abort", "data": 5}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {"x": 1}}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {}, "y": 1}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {}}]}),
    ("transaction", {"actions": [], "x": 1}),
    ("transaction", {"actions": [], "properties": 1}),
    ("transaction", {"actions": [], "properties": {"completion-mode": "x"}}),
]
GARBAGE: list[bytes] = [
    b"garbage", b"GET / HTTP/1.1\r\nHost: x\r\n", b'{"a":1,}', b'{"a" 1}', b"{1:1}", b"[1 2]", b"[1,]",
    b"[,1]", b"{,}", b'{"a":}', b'{"a":1 "b":2}', b'{"a"}', b"{a:1}", b"[bad]", b'{"a":1,"a":2}', b'"\\u12"',
    b'"\\q"', b"[01]", b"[1.]", b"[.5]", b"[+1]", b"[1e]", b"[-]", b"[NaN]", b'"a\nb"', b"{'a':'it\\'s'}",
    b"\xff\xfe", b"\xc3\xa9", b'"\xff"', b"[}", b"{]", b"}{", b"@#$", b'@{"a":1}', b"tru{}", b'"unterminated',
    b"\t@\t{}", b'"\\uD800"', b"12-3", b"[[1,2]", b"{:1}", b'{"a":nul}',
]  # fmt: skip
BEFORE_NEGOTIATION: list[Json] = [
    {"execute": "query-version"},
    {"execute": "no-such-command", "id": 1},
    {"execute": 5},
    {"exec": 5},
    {"execute": "qmp_capabilities", "arguments": {"enable": 1}},
    {"execute": "qmp_capabilities", "arguments": {"x": 1}},
]


async def _negotiate(*clients: QmpClient) -> None:
    for client in clients:
        assert await client.execute("qmp_capabilities") == {}


async def test_errors_before_negotiation_are_qemus(path: Path) -> None:
    async with (
        bench(path) as control,
        control.connected(negotiate=False) as ours,
        qemu(path.parent) as theirs,
    ):
        for message in BEFORE_NEGOTIATION:
            assert await ours.ask(message) == await theirs.ask(message)


async def test_errors_for_bad_messages_are_qemus(path: Path) -> None:
    async with bench(path) as control, control.connected() as ours, qemu(path.parent) as theirs:
        await _negotiate(theirs)
        for message in BAD_MESSAGES:
            # A number, alone, ends only where something else begins.
            data = json.dumps(message).encode() + b"\n"
            await ours.send_bytes(data)
            await theirs.send_bytes(data)
            assert await ours.receive_answer() == await theirs.receive_answer(), message


async def test_errors_for_bad_arguments_are_qemus(path: Path) -> None:
    async with bench(path) as control, control.connected() as ours, qemu(path.parent) as theirs:
        await _negotiate(theirs)
        for name, arguments in BAD_ARGUMENTS:
            mine = await ours.fail(name, arguments)
            assert mine == await theirs.fail(name, arguments), (name, arguments)


FULL: dict[str, Json] = {"device": "disk", "target": "target", "sync": "full", "job-id": "j"}
REFUSED_BACKUPS: list[dict[str, Json]] = [
    {"device": "none"},
    {"target": "none"},
    {"device": "none", "target": "none"},
    {"target": "disk"},
    {"target": "small"},
    {"target": "read-only"},
    {"job-id": "1bad"},
    {"speed": -1},
    {"job-id": "1bad", "speed": -1},
    {"filter-node-name": "target"},
    {"filter-node-name": "1bad"},
    {"x-perf": {"max-workers": 0}},
    {"x-perf": {"max-workers": 1 << 31}},
    {"x-perf": {"max-chunk": -1}},
    {"x-perf": {"max-chunk": 4096}},
    {"x-perf": {"max-workers": 0}, "target": "small"},
    {"x-perf": {"max-chunk": 4096}, "target": "small"},
    {"target": "small", "job-id": "1bad"},
    {"target": "read-only", "job-id": "1bad"},
    {"sync": "incremental"},
    {"sync": "bitmap"},
    {"sync": "incremental", "target": "none"},
    {"sync": "incremental", "bitmap": "none"},
    {"sync": "incremental", "bitmap": "none", "target": "disk"},
    {"sync": "incremental", "bitmap": "none", "bitmap-mode": "never"},
    {"bitmap": "none"},
    {"bitmap-mode": "always"},
    {"bitmap-mode": "always", "target": "disk"},
]


async def test_what_a_backup_is_refused_for_is_qemus(
    serve: ServeFunction, path: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, length in (("disk", DISK_BYTES), ("target", DISK_BYTES), ("small", DISK_BYTES - 512)):
        (images / name).write_bytes(bytes(length))
    server = await asyncio.to_thread(serve, disk=images / "disk", tcp=False)
    reader, writer = await _connect(server.control)
    ours = QmpClient(reader, writer)
    await ours.receive()
    try:
        async with qemu(path.parent) as theirs:
            await _negotiate(ours, theirs)
            for name, file, read_only in (
                ("target", "target", False), ("small", "small", False), ("read-only", "target", True),
            ):  # fmt: skip
                node: dict[str, Json] = {"driver": "file", "node-name": name, "read-only": read_only}
                node["filename"] = str(images / file)
                for client in (ours, theirs) if name != "target" else (ours,):
                    await client.execute("blockdev-add", node)
            for change in REFUSED_BACKUPS:
                mine = await ours.fail("blockdev-backup", FULL | change)
                assert mine == await theirs.fail("blockdev-backup", FULL | change), change
            assert await ours.execute("query-jobs") == []
    finally:
        writer.close()


async def _answers_to_garbage(client: QmpClient, data: bytes) -> list[Json]:
    # What is still open after the garbage is closed first.
    await client.send_bytes(data + b'\n}]}]\n{"execute": "query-jobs", "id": "end"}\n')
    answers: list[Json] = []
    while (answer := await client.receive_answer()).get("id") != "end":
        answers.append(answer["error"])
    return answers


@pytest.mark.parametrize("data", GARBAGE, ids=repr)
async def test_garbage_is_answered_as_by_qemu(path: Path, data: bytes) -> None:
    async with bench(path) as control, control.connected() as ours, qemu(path.parent) as theirs:
        await _negotiate(theirs)
        assert await _answers_to_garbage(ours, data) == await _answers_to_garbage(theirs, data)


async def _life(client: QmpClient, steps: list[tuple[str, dict[str, Json]]], last: str) -> list[str]:
    """Run the commands; every event up to the status `last`, without QEMU's pauses for drains."""
    for name, arguments in steps:
        await client.execute(name, arguments)
    words: list[str] = []
    while not words or words[-1] != last:
        if client.events:
            event = client.events.pop(0)
        else:
            message = await client.receive()
            assert message is not None
            event = message
        data = event["data"]
        assert isinstance(data, dict)
        if event["event"] == "JOB_STATUS_CHANGE":
            words.append(str(data["status"]))
        else:
            words.append(f"{event['event']} {sorted(data)}")
        if words[-2:] == ["running", "paused"]:
            del words[-1]
        if words[-2:] == ["running", "running"]:
            del words[-1]
    return words


BACKUP: dict[str, Json] = {"device": "disk", "target": "target", "sync": "full", "job-id": "j"}
MANUAL: dict[str, Json] = {**BACKUP, "auto-finalize": False, "auto-dismiss": False}


@pytest.mark.parametrize(
    ("start", "after", "last"),
    [
        (BACKUP, [], "null"),
        (MANUAL, [("job-finalize", {"id": "j"}), ("job-dismiss", {"id": "j"})], "null"),
        (MANUAL, [("job-cancel", {"id": "j"})], "concluded"),
    ],
    ids=["automatic", "manual", "cancelled while pending"],
)
async def test_events_come_in_qemus_order(
    path: Path, start: dict[str, Json], after: list[tuple[str, dict[str, Json]]], last: str
) -> None:
    async def live(client: QmpClient) -> list[str]:
        if not after:
            return await _life(client, [("blockdev-backup", start)], last)
        words = await _life(client, [("blockdev-backup", start)], "pending")
        words += await _life(client, after[:1], "concluded")
        return words + (await _life(client, after[1:], last) if after[1:] else [])

    async with bench(path) as control, control.connected() as ours, qemu(path.parent) as theirs:
        await _negotiate(theirs)
        control.backups.steps_allowed = 1
        assert await live(ours) == await live(theirs)


async def test_events_of_a_cancelled_job_come_in_qemus_order(path: Path) -> None:
    slow: dict[str, Json] = {**BACKUP, "speed": 1}
    steps: list[tuple[str, dict[str, Json]]] = [("blockdev-backup", slow), ("job-cancel", {"id": "j"})]
    async with bench(path) as control, control.connected() as ours, qemu(path.parent) as theirs:
        await _negotiate(theirs)
        assert await _life(ours, steps, "null") == await _life(theirs, steps, "null")


SLOW: dict[str, Json] = {**MANUAL, "speed": 1}
STATES: dict[str, list[tuple[str, dict[str, Json]]]] = {
    "running": [("blockdev-backup", SLOW)],
    "paused": [("blockdev-backup", SLOW), ("job-pause", {"id": "j"})],
    "pending": [("blockdev-backup", MANUAL)],
    "concluded": [("blockdev-backup", SLOW), ("job-cancel", {"id": "j"})],
}
VERBS: list[tuple[str, dict[str, Json]]] = [
    ("job-pause", {"id": "j"}),
    ("job-complete", {"id": "j"}),
    ("job-finalize", {"id": "j"}),
    ("job-dismiss", {"id": "j"}),
    ("job-resume", {"id": "j"}),
    ("job-cancel", {"id": "j"}),
    ("block-job-cancel", {"device": "j"}),
    ("block-job-set-speed", {"device": "j", "speed": -1}),
]
ACCEPTED = {
    "running": {"job-pause", "job-resume", "job-cancel", "block-job-cancel"},
    "paused": {"job-resume", "job-cancel"},
    "pending": {"job-finalize", "job-cancel", "block-job-cancel"},
    "concluded": {"job-dismiss"},
}
"""What would change the state; everything else must be refused, by both, with the same words."""


async def _wait_job_status(client: QmpClient, status: str) -> None:
    while True:
        jobs = await client.execute("query-jobs")
        assert isinstance(jobs, list)
        if jobs[0]["status"] == status:
            return
        # Whatever changes after the answer announces itself after it.
        assert await client.receive() is not None


@pytest.mark.parametrize("status", STATES)
async def test_verbs_are_refused_in_each_state_as_by_qemu(path: Path, status: str) -> None:
    async with bench(path) as control, control.connected() as ours, qemu(path.parent) as theirs:
        await _negotiate(theirs)
        # The second step is what the rate limit holds up.
        control.backups.steps_in_all = control.backups.steps_allowed = 2
        for client in (ours, theirs):
            for name, arguments in STATES[status]:
                await client.execute(name, arguments)
            await _wait_job_status(client, status)
        for name, arguments in VERBS:
            if name not in ACCEPTED[status]:
                assert await ours.fail(name, arguments) == await theirs.fail(name, arguments), name
        for client in (ours, theirs):
            if status != "concluded":
                await client.execute("job-cancel", {"id": "j"})
