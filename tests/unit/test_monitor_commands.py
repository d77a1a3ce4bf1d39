"""What the commands ask of the services, and what they make of the answers."""

from pathlib import Path

import pytest

from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.events import Json
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode, TargetPath
from nbdbackup.monitor.services_exports import ExportRequest, ServerRequest
from nbdbackup.monitor.services_graph import (
    BitmapRef,
    CopyBeforeWriteNode,
    FileNode,
    InetAddress,
    RawNode,
    RemoteNode,
    SnapshotAccessNode,
    SocketPath,
)
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from tests.support.monitor import bench

SNAPSHOT = {
    "node": "disk",
    "name": "s1",
    "export": "disk@s1",
    "uris": ["nbd://127.0.0.1:10809/disk%40s1"],
    "created": "2026-11-23T03:04:05.000000Z",
    "size": 1 << 20,
    "cluster-size": 65536,
    "scratch-used": 0,
    "scratch-max": None,
    "state": "ok",
    "cause": None,
    "bitmap": None,
    "persistent": False,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


async def test_query_commands_lists_them_all_once(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        answer = await client.execute("query-commands")
        assert isinstance(answer, list)
        names = [entry["name"] for entry in answer]
        assert names == sorted(set(names))
        assert {"qmp_capabilities", "quit", "blockdev-backup", "x-nbdbackup-snapshot-create"} <= set(names)


async def test_quit_answers_and_asks_for_shutdown(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        assert await client.execute("quit") == {}
        assert control.shutdown.is_set()


async def test_snapshot_create_list_and_drop(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {"nodes": ["disk"], "name": "s1"}
        assert await client.execute("x-nbdbackup-snapshot-create", arguments) == [SNAPSHOT]
        assert control.snapshots.taken == [(["disk"], SnapshotOptions(name="s1"))]
        assert await client.execute("x-nbdbackup-query-snapshots") == [SNAPSHOT]
        assert await client.execute("x-nbdbackup-snapshot-drop", {"snapshots": ["disk@s1"]}) == {}
        assert await client.execute("x-nbdbackup-query-snapshots") == []
        assert await client.fail("x-nbdbackup-snapshot-drop", {"snapshots": ["disk@s1"]}) == (
            "GenericError",
            "No snapshot is called 'disk@s1'",
        )


async def test_snapshot_options_are_passed_on(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {
            "nodes": ["a", "b"],
            "scratch": "/scratch",
            "scratch-max": 1 << 30,
            "on-cbw-error": "break-guest-write",
            "cbw-timeout": 1.5,
        }
        await client.execute("x-nbdbackup-snapshot-create", arguments)
        options = SnapshotOptions(None, "/scratch", 1 << 30, OnCbwError.BREAK_GUEST_WRITE, 1.5)
        assert control.snapshots.taken == [(["a", "b"], options)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"nodes": []}, "Parameter 'nodes' expects at least one name"),
        ({"nodes": ["a", "a"]}, "Parameter 'nodes' names 'a' twice"),
        ({"nodes": ["a"], "scratch-max": 0}, "Parameter 'scratch-max' expects a positive number of bytes"),
        (
            {"nodes": ["a"], "cbw-timeout": -1},
            "Parameter 'cbw-timeout' expects a non-negative number of seconds",
        ),
        ({"nodes": ["a"], "on-cbw-error": "x"}, "Parameter 'on-cbw-error' does not accept value 'x'"),
    ],
)
async def test_bad_snapshot_is_refused(path: Path, arguments: dict[str, Json], text: str) -> None:
    async with bench(path) as control, control.connected() as client:
        assert await client.fail("x-nbdbackup-snapshot-create", arguments) == ("GenericError", text)
        assert control.snapshots.taken == []


async def test_backup_to_a_path_answers_with_the_jobs_id(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {"node": "disk", "target": "/backup/disk.img", "sync": "full"}
        assert await client.execute("x-nbdbackup-backup", arguments) == {"job-id": "backup-1"}
        expected = BackupRequest("disk", TargetPath("/backup/disk.img"), scratch="auto")
        assert control.backups.requests == [expected]


async def test_backup_options_are_passed_on(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {
            "node": "disk",
            "target": "/t",
            "existing": True,
            "sync": "full",
            "job-id": "j",
            "speed": 5,
            "workers": 3,
            "scratch": "/s",
            "scratch-max": 9,
            "on-cbw-error": "break-guest-write",
            "auto-finalize": False,
            "auto-dismiss": False,
        }
        assert await client.execute("x-nbdbackup-backup", arguments) == {"job-id": "j"}
        assert control.backups.requests == [
            BackupRequest(
                "disk",
                TargetPath("/t", existing=True),
                job_id="j",
                speed=5,
                workers=3,
                scratch="/s",
                scratch_bytes_max=9,
                on_cbw_error=OnCbwError.BREAK_GUEST_WRITE,
                auto_finalize=False,
                auto_dismiss=False,
            )
        ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": "t.img"}, "Parameter 'target' expects an absolute path or an NBD URI, not 't.img'"),
        ({"sync": "some"}, "Parameter 'sync' does not accept value 'some'"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ({"workers": 0}, "Parameter 'workers' expects a number between 1 and 64"),
        ({"workers": 65}, "Parameter 'workers' expects a number between 1 and 64"),
        (
            {"scratch": "here"},
            "Parameter 'scratch' expects 'auto', 'none' or the absolute path of a directory",
        ),
        ({"scratch-max": -1}, "Parameter 'scratch-max' expects a positive number of bytes"),
    ],
)
async def test_bad_backup_is_refused(path: Path, change: dict[str, Json], text: str) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {"node": "disk", "target": "/t", "sync": "full"}
        assert await client.fail("x-nbdbackup-backup", arguments | change) == ("GenericError", text)
        assert control.backups.requests == []


async def test_blockdev_backup_is_direct_and_breaks_guest_writes_as_in_qemu(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {"device": "disk", "target": "t", "sync": "full"}
        assert await client.execute("blockdev-backup", arguments) == {}
        assert control.backups.requests == [
            BackupRequest(
                "disk",
                TargetNode("t"),
                job_id="disk",
                workers=64,
                use_copy_range=False,
                scratch="none",
                on_cbw_error=OnCbwError.BREAK_GUEST_WRITE,
            )
        ]


async def test_blockdev_backup_passes_its_tuning_on(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        perf = {"use-copy-range": True, "max-workers": 1000, "max-chunk": 1 << 20, "min-cluster-size": 4096}
        arguments: dict[str, Json] = {
            "device": "disk", "target": "t", "sync": "full", "job-id": "j", "speed": 3, "x-perf": perf,
        }  # fmt: skip
        await client.execute("blockdev-backup", arguments)
        (request,) = control.backups.requests
        assert (request.workers, request.chunk_bytes_max, request.cluster_bytes_min) == (1000, 1 << 20, 4096)
        assert (request.use_copy_range, request.job_id, request.speed) == (True, "j", 3)


async def test_blockdev_add_describes_the_node(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        file: dict[str, Json] = {"driver": "file", "node-name": "f", "filename": "/f", "discard": "unmap"}
        await client.execute("blockdev-add", file)
        await client.execute("blockdev-add", {"driver": "raw", "node-name": "r", "file": "f"})
        inline = {"driver": "file", "filename": "/g"}
        raw: dict[str, Json] = {"driver": "raw", "node-name": "g", "file": inline, "read-only": True}
        await client.execute("blockdev-add", raw)
        assert control.graph.added == [
            FileNode("f", "/f", "file", unmap=True),
            RawNode("r", "f"),
            RawNode("g", FileNode("", "/g", unmap=False), read_only=True),
        ]
        await client.execute("blockdev-del", {"node-name": "r"})
        assert control.graph.deleted == ["r"]


async def test_nodes_and_exports_are_listed_in_qemus_form(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        nodes = await client.execute("query-named-block-nodes", {"flat": True})
        assert isinstance(nodes, list)
        (node,) = nodes
        assert (node["node-name"], node["drv"], node["file"], node["ro"]) == (
            "disk", "raw", "/srv/disk.img", False,
        )  # fmt: skip
        assert node["image"]["virtual-size"] == 1 << 20
        assert node["image"]["actual-size"] == 4096
        assert await client.execute("query-block-exports") == [
            {"id": "disk", "type": "nbd", "node-name": "disk", "shutting-down": False}
        ]


async def test_job_can_be_followed_and_steered(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {
            "node": "disk", "target": "/t", "sync": "full", "job-id": "j", "speed": 1000,
            "auto-finalize": False, "auto-dismiss": False,
        }  # fmt: skip
        await client.execute("x-nbdbackup-backup", arguments)
        (job,) = control.backups.started
        await job.wait_reached("run")
        info = {
            "id": "j",
            "type": "backup",
            "status": "running",
            "current-progress": 0,
            "total-progress": 100,
        }
        assert await client.execute("query-jobs") == [info]
        await client.execute("block-job-set-speed", {"device": "j", "speed": 0})
        await client.execute("job-pause", {"id": "j"})
        assert await client.fail("block-job-cancel", {"device": "j"}) == (
            "GenericError",
            "The block job for device 'j' is currently paused",
        )
        await client.execute("block-job-resume", {"device": "j"})
        assert await client.execute("query-block-jobs") == [
            {
                "type": "backup", "device": "j", "len": 100, "offset": 0, "busy": True, "paused": False,
                "speed": 0, "io-status": "ok", "ready": False, "status": "running",
                "auto-finalize": False, "auto-dismiss": False,
            }
        ]  # fmt: skip
        job.step()
        await client.wait_event("BLOCK_JOB_PENDING")
        await client.execute("job-finalize", {"id": "j"})
        completed = await client.wait_event("BLOCK_JOB_COMPLETED")
        assert completed["data"] == {"device": "j", "len": 100, "offset": 100, "speed": 0, "type": "backup"}
        await job.wait_concluded()
        await client.execute("job-dismiss", {"id": "j"})
        assert await client.execute("query-jobs") == []


async def test_paused_block_job_is_cancelled_by_force(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {
            "node": "disk", "target": "/t", "sync": "full", "job-id": "j", "auto-dismiss": False,
        }  # fmt: skip
        await client.execute("x-nbdbackup-backup", arguments)
        await client.execute("block-job-pause", {"device": "j"})
        await client.execute("block-job-cancel", {"device": "j", "force": True})
        await client.wait_event("BLOCK_JOB_CANCELLED")
        await control.jobs.get("j").wait_concluded()
        jobs = await client.execute("query-jobs")
        assert isinstance(jobs, list)
        (info,) = jobs
        assert (info["status"], info["error"]) == ("concluded", "Operation canceled")


@pytest.mark.parametrize("verb", ["pause", "cancel", "resume", "complete", "finalize", "dismiss"])
async def test_unknown_job_is_told_in_each_familys_words(path: Path, verb: str) -> None:
    async with bench(path) as control, control.connected() as client:
        assert await client.fail(f"job-{verb}", {"id": "x"}) == ("GenericError", "Job not found")
        member = "id" if verb in ("finalize", "dismiss") else "device"
        assert await client.fail(f"block-job-{verb}", {member: "x"}) == (
            "DeviceNotActive",
            "Block job 'x' not found",
        )


async def test_blockdev_add_describes_the_fleecing_set_up(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        server: Json = {"type": "inet", "host": "h", "port": "10809"}
        target: Json = {"driver": "nbd", "server": server, "export": "x", "reconnect-delay": 3}
        cbw: Json = {
            "driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": target,
            "bitmap": {"node": "disk", "name": "b0"}, "on-cbw-error": "break-snapshot", "cbw-timeout": 45,
            "min-cluster-size": 1 << 20,
        }  # fmt: skip
        access: dict[str, Json] = {"driver": "snapshot-access", "node-name": "access", "file": cbw}
        await client.execute("blockdev-add", access)
        assert control.graph.added == [
            SnapshotAccessNode(
                "access",
                CopyBeforeWriteNode(
                    "cbw",
                    "disk",
                    RemoteNode("", InetAddress("h", "10809"), "x", unmap=True, reconnect_delay_s=3),
                    BitmapRef("disk", "b0"),
                    OnCbwError.BREAK_SNAPSHOT,
                    45,
                    1 << 20,
                ),
                unmap=False,
            )
        ]
        await client.execute("block-set-write-threshold", {"node-name": "disk", "write-threshold": 5})
        assert control.graph.thresholds == {"disk": 5}


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("cache", {"direct": True}),
        ("cache", {"no-flush": True}),
        ("force-share", True),
        ("detect-zeroes", "on"),
    ],
    ids=str,
)
async def test_what_blockdev_add_cannot_do_is_refused_by_name(path: Path, member: str, value: Json) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {"driver": "file", "node-name": "f", "filename": "/f", member: value}
        _, text = await client.fail("blockdev-add", arguments)
        assert text.startswith(f"Parameter '{member}")
        assert text.endswith("is not supported: leave it out")
        assert control.graph.added == []


async def test_exports_and_servers_are_asked_for_as_in_qemu(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        address: Json = {"type": "unix", "data": {"path": "/s"}}
        await client.execute("nbd-server-start", {"addr": address})
        address = {"type": "inet", "data": {"host": "::1", "port": "0"}}
        limits: dict[str, Json] = {"max-connections": 7, "handshake-max-seconds": 0}
        await client.execute("nbd-server-start", {"addr": address, **limits})
        export: dict[str, Json] = {
            "type": "nbd", "id": "e", "node-name": "disk", "name": "n", "description": "d", "writable": True,
            "writethrough": True, "bitmaps": ["b0", {"node": "x", "name": "b1"}], "allocation-depth": True,
        }  # fmt: skip
        await client.execute("block-export-add", export)
        await client.execute("block-export-del", {"id": "e"})
        await client.execute("block-export-del", {"id": "e", "mode": "hard"})
        await client.execute("nbd-server-stop")
        assert control.exports.asked == [
            ServerRequest(SocketPath("/s"), 100, 10),
            ServerRequest(InetAddress("::1", "0"), 7, 0),
            ExportRequest("e", "disk", "n", "d", True, True, ("b0", BitmapRef("x", "b1"))),
            ("e", False),
            ("e", True),
            None,
        ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"addr": {"type": "unix", "data": {"path": "/s"}}, "tls-creds": "tls0"},
        {"addr": {"type": "fd", "data": {"str": "3"}}},
        {"addr": {"type": "vsock", "data": {"cid": "2", "port": "1"}}},
        {"addr": {"type": "unix", "data": {"path": "/s", "abstract": True}}},
        {"addr": {"type": "inet", "data": {"host": "h", "port": "1", "to": 5}}},
        {"addr": {"type": "unix", "data": {"path": "/s"}}, "max-connections": -1},
    ],
    ids=str,
)
async def test_what_nbd_server_start_cannot_do_is_refused_by_name(
    path: Path, arguments: dict[str, Json]
) -> None:
    async with bench(path) as control, control.connected() as client:
        _, text = await client.fail("nbd-server-start", arguments)
        assert text.startswith("Parameter '")
        assert control.exports.asked == []
