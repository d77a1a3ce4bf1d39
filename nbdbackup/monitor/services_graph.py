"""Nodes as commands describe them and as they are listed, and the service that has them."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import msgspec

from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.monitor.services_bitmaps import BitmapInfo


class FileNode(msgspec.Struct, frozen=True):
    """A new node `name` on the file or block device `filename`."""

    name: str
    filename: str
    driver: str = "file"
    """What the node says it is: file or host_device."""
    read_only: bool = False
    auto_read_only: bool = False
    """Whether to go on read-only if it may not be written."""
    unmap: bool = True
    """Whether trim and write_zeroes may give space back."""
    lock: bool = True


class InetAddress(msgspec.Struct, frozen=True):
    """TCP: `host` and `port`, a number or the name of a service."""

    host: str
    port: str


class SocketPath(msgspec.Struct, frozen=True):
    """A Unix socket at `path`."""

    path: str


class RemoteNode(msgspec.Struct, frozen=True):
    """A new node `name` on the export `export` of the NBD server at `address`."""

    name: str
    address: InetAddress | SocketPath
    export: str = ""
    read_only: bool = False
    unmap: bool = True
    reconnect_delay_s: float = 0


class NullNode(msgspec.Struct, frozen=True):
    """A new node `name` of `size` zero bytes that forgets what is written."""

    name: str
    size: int
    read_only: bool = False


class RawNode(msgspec.Struct, frozen=True):
    """A new node `name` that passes everything on to `child`, or to a part of it."""

    name: str
    child: "NodeRef"
    read_only: bool = False
    offset: int | None = None
    size: int | None = None
    """With both None it is `child` under another name."""


class BitmapRef(msgspec.Struct, frozen=True):
    """The dirty bitmap `name` of `node`."""

    node: str
    name: str


class CopyBeforeWriteNode(msgspec.Struct, frozen=True):
    """A new node `name`: `file`, whose old contents are saved in `target` from now on before they change."""

    name: str
    file: "NodeRef"
    target: "NodeRef"
    bitmap: BitmapRef | None = None
    """Save what is dirty there; None: everything."""
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout_s: int = 0
    """0: no limit."""
    cluster_bytes_min: int = 0
    read_only: bool = False


class SnapshotAccessNode(msgspec.Struct, frozen=True):
    """A new node `name` that shows the point in time of the copy-before-write node `file`."""

    name: str
    file: "NodeRef"
    read_only: bool = False
    unmap: bool = True
    """Whether discarding through it frees what was saved, and ends the point in time there."""


NodeDefinition: TypeAlias = (
    FileNode | RemoteNode | NullNode | RawNode | CopyBeforeWriteNode | SnapshotAccessNode
)
NodeRef: TypeAlias = str | NodeDefinition
"""A node that is there, or one to be made, which goes with the one that it is for; "" as its name: any."""


class NodeInfo(msgspec.Struct, frozen=True):
    """A node as it stands. Sizes are bytes."""

    name: str
    driver: str
    filename: str
    size: int
    read_only: bool
    allocated: int | None = None
    """What it takes up on its file system, where that is known."""
    write_threshold: int = 0
    """0: none."""
    children: tuple[tuple[str, str], ...] = ()
    """(role, name of the node)."""
    backing: "NodeInfo | None" = None
    """Of a filter: what it filters."""
    bitmaps: Sequence[BitmapInfo] = ()


class GraphService(Protocol):
    """The nodes."""

    def nodes(self) -> Sequence[NodeInfo]:
        """Every node."""

    async def add(self, node: NodeDefinition) -> None:
        """Open a node."""

    async def delete(self, name: str) -> None:
        """Close the node `name`, which nothing may use."""

    async def set_write_threshold(self, name: str, threshold: int) -> None:
        """Tell once (BLOCK_WRITE_THRESHOLD) that a write ends behind byte `threshold`; 0: do not."""
