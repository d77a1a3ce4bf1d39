"""libnbd as a client, with its own checks switched off so that wrong requests reach the server."""

import textwrap
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.peers import require_libnbd_python
from tests.support.processes import run

PROLOGUE = """
import errno, sys, nbd

def connect(uri, *contexts):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    return handle

def error_of(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        return error.errno
    return None

uri = sys.argv[1]
"""

transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


def nbdsh(script: str, *arguments: str) -> str:
    """Run a script for libnbd; its assertions must hold."""
    return run(require_libnbd_python(), "-c", PROLOGUE + textwrap.dedent(script), *arguments)


@transports
def test_wrong_requests_get_their_errno_and_the_handle_stays_usable(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", 2 * MIB)
    before = sha256(disk)
    server = serve(disk=disk)
    nbdsh(
        """
        h = connect(uri, "base:allocation")
        size = h.get_size()
        assert error_of(h.pread, 2, size - 1) == "EINVAL"
        assert error_of(h.pwrite, b"ab", size - 1) == "ENOSPC"
        assert error_of(h.zero, 512, size) == "ENOSPC"
        assert error_of(h.trim, 512, size) == "EINVAL"
        assert error_of(h.block_status, 512, size, lambda *_: 0) == "EINVAL"
        assert error_of(h.pwrite, b"a" * 512, 0, flags=nbd.CMD_FLAG_NO_HOLE) == "EINVAL"
        assert error_of(h.trim, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO) == "EINVAL"
        assert len(h.pread(512, 0)) == 512
        h.shutdown()
        """,
        server.uri("disk", transport),
    )
    assert sha256(disk) == before


@transports
def test_a_read_only_export_refuses_every_write_with_eperm(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB), options=["-r"])
    nbdsh(
        """
        h = connect(uri)
        assert h.is_read_only()
        for call in (lambda: h.pwrite(b"a" * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
            assert error_of(call) == "EPERM"
        assert len(h.pread(512, 0)) == 512
        """,
        server.uri("disk", transport),
    )


@transports
def test_replies_out_of_order_on_many_handles_have_the_right_bytes(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    server = serve(disk=make_sparse(tmp_path / "disk.img", 16 * MIB))
    nbdsh(
        """
        handles = [connect(uri) for _ in range(4)]
        assert all(h.can_multi_conn() for h in handles)
        pending = []
        for block in range(256):
            data = nbd.Buffer.from_bytearray(bytearray(block.to_bytes(2, "big") * 32768))
            handle = handles[block % 4]
            pending.append((handle, handle.aio_pwrite(data, block * 65536), data))
        for handle, cookie, data in pending:
            while not handle.aio_command_completed(cookie):
                handle.poll(10000)
        handles[0].flush()
        for block in range(256):
            assert handles[(block + 1) % 4].pread(65536, block * 65536) == block.to_bytes(2, "big") * 32768
        """,
        server.uri("disk", transport),
    )


@transports
def test_block_status_of_one_request_and_of_the_whole_disk(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_sparse(tmp_path / "disk.img", 8 * MIB)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x" * MIB)
    server = serve(disk=disk)
    nbdsh(
        """
        h = connect(uri, "base:allocation")
        entries = []
        h.block_status(8 << 20, 0, lambda context, offset, list, error: entries.extend(list) or 0)
        assert entries == [1 << 20, 3, 1 << 20, 0, 6 << 20, 3], entries
        entries.clear()
        h.block_status(8 << 20, 0, lambda context, offset, list, error: entries.extend(list) or 0,
                       flags=nbd.CMD_FLAG_REQ_ONE)
        assert entries == [1 << 20, 3], entries
        """,
        server.uri("disk", transport),
    )


def test_unknown_contexts_are_ignored_and_the_known_one_is_listed(
    tmp_path: Path, serve: ServeFunction
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB))
    nbdsh(
        """
        h = nbd.NBD()
        h.set_opt_mode(True)
        for context in ("x-unknown:thing", "base:allocation"):
            h.add_meta_context(context)
        h.connect_uri(uri)
        listed = []
        h.opt_list_meta_context(lambda name: listed.append(name) or 0)
        assert listed == ["base:allocation"], listed
        assert error_of(lambda: (h.set_export_name("nosuch"), h.opt_info())) == "ENOENT"
        h.set_export_name("disk")
        h.opt_go()
        assert h.can_meta_context("base:allocation")
        assert not h.can_meta_context("x-unknown:thing")
        """,
        server.uri("disk"),
    )


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "only-export-name"])
def test_old_clients_without_structured_replies_or_fixed_newstyle_are_served(
    tmp_path: Path, serve: ServeFunction, fixed: bool
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB))
    nbdsh(
        """
        h = nbd.NBD()
        h.set_request_structured_replies(False)
        if sys.argv[2] == "False":
            h.set_handshake_flags(0)
        h.connect_uri(uri)
        assert h.get_protocol() == ("newstyle-fixed" if sys.argv[2] == "True" else "newstyle")
        assert not h.get_structured_replies_negotiated()
        assert h.pread(1 << 20, 0) == open(sys.argv[3], "rb").read()
        """,
        server.uri("disk"),
        str(fixed),
        str(tmp_path / "disk.img"),
    )
