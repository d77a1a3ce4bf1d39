"""Commands about exports, and about where else the server listens."""

from enum import Enum
from typing import Annotated

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.node_options import (
    BitmapOptions,
    FdOptions,
    InetAddressOptions,
    UnixAddressOptions,
    VsockOptions,
    check_plain_host,
    check_plain_path,
    check_uint32,
)
from nbdbackup.monitor.schema import Arguments, NoArguments
from nbdbackup.monitor.services_exports import (
    ExportInfo,
    ExportRequest,
    ServerRequest,
)
from nbdbackup.monitor.services_graph import BitmapRef, InetAddress, SocketPath

CLIENTS_MAX_DEFAULT = 100
HANDSHAKE_S_DEFAULT = 10


class InetAddr(Arguments, frozen=True, kw_only=True, tag_field="type", tag="inet"):
    data: InetAddressOptions


class UnixAddr(Arguments, frozen=True, kw_only=True, tag_field="type", tag="unix"):
    data: UnixAddressOptions


class FdAddr(Arguments, frozen=True, kw_only=True, tag_field="type", tag="fd"):
    data: FdOptions


class VsockAddr(Arguments, frozen=True, kw_only=True, tag_field="type", tag="vsock"):
    data: VsockOptions


class NbdServerStartArguments(Arguments, frozen=True, kw_only=True):
    addr: InetAddr | UnixAddr | FdAddr | VsockAddr
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: int = CLIENTS_MAX_DEFAULT
    handshake_max_seconds: int = HANDSHAKE_S_DEFAULT


class NbdExportOptions(Arguments, frozen=True, kw_only=True, tag_field="type", tag="nbd"):
    id: str
    fixed_iothread: bool = False
    iothread: str | None = None
    node_name: str
    writable: bool = False
    writethrough: bool = False
    name: str | None = None
    description: str | None = None
    bitmaps: list[Annotated[str | BitmapOptions, msgspec.Meta(title="BlockDirtyBitmapOrStr")]] | None = None
    allocation_depth: bool = False


class ExportRemoveMode(Enum):
    SAFE = "safe"
    HARD = "hard"


class BlockExportDelArguments(Arguments, frozen=True, kw_only=True):
    id: str
    mode: ExportRemoveMode = ExportRemoveMode.SAFE


@command("nbd-server-start", NbdServerStartArguments)
async def nbd_server_start(services: Services, arguments: NbdServerStartArguments) -> Json:
    check_uint32("max-connections", arguments.max_connections)
    check_uint32("handshake-max-seconds", arguments.handshake_max_seconds)
    if arguments.tls_creds is not None or arguments.tls_authz is not None:
        raise UsageError(
            "Parameter 'tls-creds' is not supported: every listener has the TLS of nbdbackup serve"
        )
    request = ServerRequest(
        _address(arguments.addr), arguments.max_connections, arguments.handshake_max_seconds
    )
    await services.exports.start_server(request)
    return {}


@command("nbd-server-stop", NoArguments)
async def nbd_server_stop(services: Services, arguments: NoArguments) -> Json:
    del arguments
    await services.exports.stop_server()
    return {}


@command("block-export-add", NbdExportOptions)
async def block_export_add(services: Services, arguments: NbdExportOptions) -> Json:
    if arguments.iothread is not None:
        raise UsageError("Parameter 'iothread' is not supported: leave it out")
    bitmaps = tuple(
        bitmap if isinstance(bitmap, str) else BitmapRef(bitmap.node, bitmap.name)
        for bitmap in arguments.bitmaps or ()
    )
    request = ExportRequest(
        id=arguments.id,
        node=arguments.node_name,
        name=arguments.name,
        description=arguments.description or "",
        writable=arguments.writable,
        writethrough=arguments.writethrough,
        bitmaps=bitmaps,
    )
    await services.exports.add(request)
    return {}


@command("block-export-del", BlockExportDelArguments)
async def block_export_del(services: Services, arguments: BlockExportDelArguments) -> Json:
    await services.exports.delete(arguments.id, hard=arguments.mode is ExportRemoveMode.HARD)
    return {}


@command("query-block-exports", NoArguments)
async def query_block_exports(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_export_info(export) for export in services.exports.exports()]


def _export_info(export: ExportInfo) -> dict[str, Json]:
    return {
        "id": export.id,
        "type": "nbd",
        "node-name": export.node,
        "shutting-down": export.shutting_down,
    }


def _address(address: InetAddr | UnixAddr | FdAddr | VsockAddr) -> InetAddress | SocketPath:
    match address:
        case InetAddr(data=inet):
            check_plain_host(inet, "addr.data")
            return InetAddress(inet.host, inet.port)
        case UnixAddr(data=unix):
            check_plain_path(unix, "addr.data")
            return SocketPath(unix.path)
        case _:
            raise UsageError("Parameter 'addr.type' must be 'inet' or 'unix': no other kind is supported")
