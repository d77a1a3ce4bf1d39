"""The NBD server and its exports over QMP (QEMU's tests 223, 307)."""

from nbdbackup.job.events import Json
from tests.oracle import differences
from tests.oracle.backups import HELD, cancel, disks, start
from tests.oracle.both import MIB, Both
from tests.oracle.script import script

UNIX: dict[str, Json] = {"type": "unix", "data": {"path": "{dir}/nbd.sock"}}
EXPORT: dict[str, Json] = {"type": "nbd", "id": "e", "node-name": "disk"}


@script()
async def test_the_server(both: Both) -> None:
    await disks(both)
    await both.fail("nbd-server-stop")
    await both.fail("block-export-add", **EXPORT)
    await both.fail("nbd-server-start")
    await both.fail("nbd-server-start", addr={"type": "bogus", "data": {}})
    await both.fail("nbd-server-start", addr={"type": "unix", "data": {}})
    await both.differing(differences.TLS_CREDENTIALS).fail("nbd-server-start", addr=UNIX, tls_creds="nope")
    await both.run("nbd-server-start", addr=UNIX)
    await both.fail("nbd-server-start", addr=UNIX)
    await both.run("block-export-add", **EXPORT)
    await both.run("query-block-exports")
    await both.run("nbd-server-stop")
    await both.wait_event("BLOCK_EXPORT_DELETED")
    await both.run("query-block-exports")
    await both.fail("nbd-server-stop")
    await both.run("nbd-server-start", addr=UNIX, max_connections=1)
    await both.run("block-export-add", **EXPORT)
    await both.io("disk", "read 0 64k")


@script()
async def test_life_of_an_export(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await both.run("query-block-exports")
    await both.run("block-export-add", **EXPORT)
    await both.run("query-block-exports")
    await both.fail("block-export-add", **EXPORT)
    await both.fail("block-export-add", **{**EXPORT, "id": "f"})
    await both.run("block-export-add", **{**EXPORT, "id": "f", "name": "other", "writable": True})
    await both.differing(differences.LIST_ORDER).run("query-block-exports")
    await both.io("disk", "read 0 64k")
    await both.io("disk", "write 0 64k", fails=True)
    await both.io("other", "write 0 64k")
    await both.differing(differences.NAMES_USERS).fail("blockdev-del", node_name="disk")
    await both.fail("block-export-del", id="nope")
    await both.run("block-export-del", id="e")
    await both.wait_event("BLOCK_EXPORT_DELETED")
    await both.fail("block-export-del", id="e")
    await both.run("block-export-del", id="f", mode="hard")
    await both.wait_event("BLOCK_EXPORT_DELETED")
    await both.run("query-block-exports")
    await both.run("blockdev-del", node_name="disk")


@script()
async def test_exports_that_are_refused(both: Both) -> None:
    await disks(both)
    await both.disk("frozen", MIB, read_only=True)
    await both.start_nbd()
    refused: tuple[dict[str, Json], ...] = (
        {"type": "bogus"},
        {"node-name": "nope"},
        {"id": ""},
        {"id": "1 e"},
        {"id": 5},
        {"name": "n" * 5000},
        {"description": "d" * 5000},
        {"node-name": "frozen", "writable": True},
        {"writable": 1},
        {"bogus": 1},
        {"bitmaps": ["nope"]},
        {"bitmaps": 5},
    )
    for change in refused:
        await both.fail("block-export-add", **{**EXPORT, **change})
        await both.run("query-block-exports")
    for missing in ("type", "id", "node-name"):
        await both.fail(
            "block-export-add", **{name: value for name, value in EXPORT.items() if name != missing}
        )
    await both.fail("block-export-del", id="e", mode="bogus")
    await both.fail("block-export-del")


@script()
async def test_what_an_export_says_to_its_clients(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await both.run("block-export-add", **EXPORT, name="named", description="what it is", writable=True)
    await both.map("named", "base:allocation")
    await both.run("block-export-add", **{**EXPORT, "id": "d"}, name="depth", **{"allocation-depth": True})
    await both.map("depth", "qemu:allocation-depth")


@script()
async def test_exports_of_nodes_in_use_by_a_job(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await start(both, **HELD)
    await both.wait("j", "running")
    await both.run("block-export-add", **EXPORT, writable=False)
    for writable in (False, True):
        target: dict[str, Json] = {**EXPORT, "id": "t", "node-name": "target", "name": "t"}
        await both.either("block-export-add", **target, writable=writable)
    await both.differing(differences.LIST_ORDER).run("query-block-exports")
    await cancel(both)


@script()
async def test_a_writable_export_of_a_disk_that_is_being_backed_up(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await start(both, **HELD)
    await both.wait("j", "running")
    await both.part(differences.WRITABLE_LATE, "accepted", "block-export-add", **EXPORT, writable=True)


@script()
async def test_nodes(both: Both) -> None:
    await both.file("a.img", MIB)
    file: dict[str, Json] = {"driver": "file", "node-name": "a", "filename": "{dir}/a.img"}
    await both.run("blockdev-add", **file)
    await both.fail("blockdev-add", **file)
    await both.fail("blockdev-add", **{**file, "node-name": "1bad"})
    missing: dict[str, Json] = {**file, "node-name": "b", "filename": "{dir}/nope"}
    await both.differing(differences.OPEN_FAILED).fail("blockdev-add", **missing)
    await both.fail("blockdev-add", driver="raw", node_name="r", file="nope")
    await both.run("blockdev-add", driver="raw", node_name="r", file="a")
    await both.differing(differences.NAMES_USERS).fail("blockdev-del", node_name="a")
    await both.run("blockdev-del", node_name="r")
    await both.run("blockdev-del", node_name="a")
    await both.fail("blockdev-del", node_name="a")


@script()
async def test_removing_an_export_that_has_a_client(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await both.run("block-export-add", **EXPORT)
    await both.connect("disk")
    await both.differing(differences.NAMES_USERS).fail("block-export-del", id="e")
    await both.differing(differences.NAMES_USERS).fail("block-export-del", id="e", mode="safe")
    await both.run("query-block-exports")
    await both.run("block-export-del", id="e", mode="hard")
    await both.wait_event("BLOCK_EXPORT_DELETED")
    await both.run("query-block-exports")
    await both.run("blockdev-del", node_name="disk")


@script()
async def test_removing_an_export_whose_client_has_left(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await both.run("block-export-add", **EXPORT)
    await both.connect("disk")
    await both.differing(differences.NAMES_USERS).fail("block-export-del", id="e")
    await both.disconnect()
    await both.io("disk", "read 0 512")
    await both.run("block-export-del", id="e", mode="hard")
    await both.wait_event("BLOCK_EXPORT_DELETED")


@script()
async def test_stopping_a_server_that_has_clients(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await both.run("block-export-add", **EXPORT)
    await both.connect("disk")
    await both.run("nbd-server-stop")
    await both.wait_event("BLOCK_EXPORT_DELETED")
    await both.run("query-block-exports")
    await both.run("blockdev-del", node_name="disk")
