"""The arguments of blockdev-add: one struct for each driver, and what they mean to the graph.

A node is described in place or by its name wherever QEMU has a BlockdevRef. Members that QEMU knows and that
could only have one effect here are accepted with that value, and refused by name with another.
"""

from enum import Enum
from typing import Annotated, TypeAlias

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.monitor.schema import Arguments
from nbdbackup.monitor.services_graph import (
    BitmapRef,
    CopyBeforeWriteNode,
    FileNode,
    InetAddress,
    NodeDefinition,
    NodeRef,
    NullNode,
    RawNode,
    RemoteNode,
    SnapshotAccessNode,
    SocketPath,
)

UINT32_MAX = (1 << 32) - 1
NULL_BYTES_DEFAULT = 1 << 30


class DiscardOption(Enum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class DetectZeroes(Enum):
    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class OnOffAuto(Enum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Aio(Enum):
    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class CacheOptions(Arguments, frozen=True, kw_only=True):
    direct: bool = False
    no_flush: bool = False


class NodeOptions(Arguments, frozen=True, kw_only=True):
    node_name: str | None = None
    discard: DiscardOption | None = None
    """None: "ignore"; of a node described inside of another one, what that one says."""
    cache: CacheOptions | None = None
    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF

    @property
    def unmap(self) -> bool:
        return self.discard is DiscardOption.UNMAP


class _File(NodeOptions, frozen=True, kw_only=True):
    filename: str
    locking: OnOffAuto = OnOffAuto.AUTO
    aio: Aio = Aio.THREADS


class FileOptions(_File, frozen=True, kw_only=True, tag_field="driver", tag="file"):
    pass


class HostDeviceOptions(_File, frozen=True, kw_only=True, tag_field="driver", tag="host_device"):
    pass


class InetAddressOptions(Arguments, frozen=True, kw_only=True):
    host: str
    port: str
    numeric: bool = False
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    mptcp: bool = False


class UnixAddressOptions(Arguments, frozen=True, kw_only=True):
    path: str
    abstract: bool = False
    tight: bool = True


class FdOptions(Arguments, frozen=True, kw_only=True):
    str_: str = msgspec.field(name="str")


class VsockOptions(Arguments, frozen=True, kw_only=True):
    cid: str
    port: str


class InetServer(InetAddressOptions, frozen=True, kw_only=True, tag_field="type", tag="inet"):
    pass


class UnixServer(UnixAddressOptions, frozen=True, kw_only=True, tag_field="type", tag="unix"):
    pass


class FdServer(FdOptions, frozen=True, kw_only=True, tag_field="type", tag="fd"):
    pass


class VsockServer(VsockOptions, frozen=True, kw_only=True, tag_field="type", tag="vsock"):
    pass


class NbdOptions(NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="nbd"):
    server: InetServer | UnixServer | FdServer | VsockServer
    export: str = ""
    tls_creds: str | None = None
    tls_hostname: str | None = None
    reconnect_delay: int = 0
    open_timeout: int = 0


class NullOptions(NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="null-co"):
    size: int = NULL_BYTES_DEFAULT
    latency_ns: int = 0
    read_zeroes: bool = False


class RawOptions(NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="raw"):
    file: Annotated["BlockdevRef", msgspec.Meta(title="BlockdevRef")]
    offset: int | None = None
    size: int | None = None


class BitmapOptions(Arguments, frozen=True, kw_only=True):
    node: str
    name: str


class CopyBeforeWriteOptions(
    NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="copy-before-write"
):
    file: Annotated["BlockdevRef", msgspec.Meta(title="BlockdevRef")]
    target: Annotated["BlockdevRef", msgspec.Meta(title="BlockdevRef")]
    bitmap: BitmapOptions | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: int = 0
    min_cluster_size: int = 0


class SnapshotAccessOptions(
    NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="snapshot-access"
):
    file: Annotated["BlockdevRef", msgspec.Meta(title="BlockdevRef")]


BlockdevOptions: TypeAlias = (
    FileOptions
    | HostDeviceOptions
    | NbdOptions
    | NullOptions
    | RawOptions
    | CopyBeforeWriteOptions
    | SnapshotAccessOptions
)
BlockdevRef: TypeAlias = str | BlockdevOptions


def definition(options: BlockdevOptions) -> NodeDefinition:
    """The node that `options` describe; "" is its name if it has none.

    Raises:
        UsageError: a value that is not for this member, or not to be had here.
    """
    _check_common(options)
    name, read_only = options.node_name or "", options.read_only
    match options:
        case FileOptions() | HostDeviceOptions():
            return _file(options, name)
        case NbdOptions():
            return _remote(options, name)
        case NullOptions(size=size):
            _check_size("size", size)
            if not size:
                raise UsageError("Parameter 'size' expects at least one byte")
            return NullNode(name, size, read_only)
        case RawOptions(file=file, offset=offset, size=size):
            _check_size("offset", offset)
            _check_size("size", size)
            return RawNode(name, _ref(file, options.discard), read_only, offset, size)
        case CopyBeforeWriteOptions():
            return _copy_before_write(options, name)
        case SnapshotAccessOptions(file=file):
            return SnapshotAccessNode(name, _ref(file, options.discard), read_only, options.unmap)


def _ref(ref: "BlockdevRef", discard: DiscardOption | None) -> NodeRef:
    """`ref` in a node with this `discard`, which passes on to a node made for it what it was told itself."""
    if isinstance(ref, str):
        return ref
    if ref.discard is None:
        ref = msgspec.structs.replace(ref, discard=discard)
    return definition(ref)


def _file(options: FileOptions | HostDeviceOptions, name: str) -> FileNode:
    return FileNode(
        name,
        options.filename,
        "file" if isinstance(options, FileOptions) else "host_device",
        options.read_only,
        options.auto_read_only,
        options.unmap,
        options.locking is not OnOffAuto.OFF,
    )


def _remote(options: NbdOptions, name: str) -> RemoteNode:
    if options.tls_creds is not None or options.tls_hostname is not None:
        raise UsageError(
            "Parameter 'tls-creds' is not supported: serve a nbds:// URI as a source (nbdbackup serve)"
        )
    check_uint32("reconnect-delay", options.reconnect_delay)
    check_uint32("open-timeout", options.open_timeout)
    if options.open_timeout:
        raise UsageError("Parameter 'open-timeout' is not supported: a node is opened at once or not at all")
    address = _address(options.server)
    return RemoteNode(
        name, address, options.export, options.read_only, options.unmap, options.reconnect_delay
    )


def _address(server: InetServer | UnixServer | FdServer | VsockServer) -> InetAddress | SocketPath:
    match server:
        case UnixServer(path=path):
            check_plain_path(server, "server")
            return SocketPath(path)
        case InetServer(host=host, port=port):
            check_plain_host(server, "server")
            return InetAddress(host, port)
        case _:
            raise UsageError("Parameter 'server.type' must be 'inet' or 'unix': no other kind is supported")


def check_plain_path(address: UnixAddressOptions, path: str) -> None:
    """Raises UsageError for what cannot be had of a Unix socket, which the user calls `path`."""
    if address.abstract or not address.tight:
        raise UsageError(f"Parameter '{path}.abstract' is not supported: use a path in the file system")


def check_plain_host(address: InetAddressOptions, path: str) -> None:
    """Raises UsageError for what cannot be had of a TCP address, which the user calls `path`."""
    for name in ("numeric", "to", "ipv4", "ipv6", "keep_alive", "mptcp"):
        if getattr(address, name):
            raise UsageError(f"Parameter '{path}.{name.replace('_', '-')}' is not supported: leave it out")


def _copy_before_write(options: CopyBeforeWriteOptions, name: str) -> CopyBeforeWriteNode:
    check_uint32("cbw-timeout", options.cbw_timeout)
    _check_size("min-cluster-size", options.min_cluster_size)
    bitmap = None if options.bitmap is None else BitmapRef(options.bitmap.node, options.bitmap.name)
    return CopyBeforeWriteNode(
        name,
        _ref(options.file, options.discard),
        # What was saved and is wanted no more goes back, whatever clients may do.
        _ref(options.target, DiscardOption.UNMAP),
        bitmap,
        options.on_cbw_error,
        options.cbw_timeout,
        options.min_cluster_size,
        options.read_only,
    )


def _check_common(options: NodeOptions) -> None:
    cache = options.cache or CacheOptions()
    unsupported = {
        "cache.direct": cache.direct,
        "cache.no-flush": cache.no_flush,
        "force-share": options.force_share,
        "detect-zeroes": options.detect_zeroes is not DetectZeroes.OFF,
    }
    for name, is_asked in unsupported.items():
        if is_asked:
            raise UsageError(f"Parameter '{name}' is not supported: leave it out")


def check_uint32(name: str, value: int) -> None:
    """Raises UsageError if `value` of the member `name` is no such number."""
    if not 0 <= value <= UINT32_MAX:
        raise UsageError(f"Parameter '{name}' expects uint32_t")


def _check_size(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise UsageError(f"Parameter '{name}' expects a non-negative number below 2^64")
