"""From the definition of a node to a node, one function for each driver.

Whatever was opened on the way is closed again when something cannot be had. Checks are made in QEMU's
order: first the file below, then the node's own name, then the rest.
"""

import errno
import logging
import socket
from contextlib import AsyncExitStack

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.ignore_discard import IgnoreDiscard
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.node import Node, drained
from nbdbackup.block.null import NullDevice
from nbdbackup.block.open import is_remote, open_device
from nbdbackup.block.window import WindowDevice
from nbdbackup.daemon.nodes.table import Child, Entry, NodeTable, slot
from nbdbackup.daemon.nodes.writers import SNAPSHOT_ACCESS, without_new_conflicts
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError, UsageError
from nbdbackup.extents import Extent
from nbdbackup.fleece.block_copy import CLUSTER_BYTES_DEFAULT, BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite
from nbdbackup.fleece.snapshot_access import SnapshotAccess
from nbdbackup.monitor.services_graph import (
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
from nbdbackup.nbd.uri import format_tcp, format_unix

logger = logging.getLogger(__name__)

SECTOR_BYTES = 512
PORT_MAX = 65535
CLUSTER_BYTES_MAX = 64 << 20
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class NodeOpener:
    """Opens nodes into `table`."""

    def __init__(self, table: NodeTable) -> None:
        self._table = table

    async def open(self, definition: NodeDefinition, owner: str | None = None) -> Entry:
        """Make the node; `owner` is the one that it is defined inside of.

        Raises:
            NbdBackupError, OSError: it cannot be had; nothing has changed.
        """
        async with AsyncExitStack() as undo:
            match definition:
                case FileNode() | RemoteNode() | NullNode():
                    entry = await self._open_leaf(definition)
                case RawNode():
                    entry = await self._open_raw(definition, undo)
                case CopyBeforeWriteNode():
                    entry = await self._open_copy_before_write(definition, undo)
                case SnapshotAccessNode():
                    entry = await self._open_snapshot_access(definition, undo)
            entry.owner = owner
            undo.push_async_callback(self._table.take_out, entry)
            for watcher in self._table.watchers:
                await watcher.load(entry)
            undo.pop_all()
        return entry

    async def _child(self, ref: NodeRef, parent: str, undo: AsyncExitStack) -> Entry:
        """The node that `ref` names or describes; if it is made here, `undo` closes it again."""
        if isinstance(ref, str):
            return self._table.entry(ref)
        entry = await self.open(ref, owner=parent)
        undo.push_async_callback(self._table.take_out, entry)
        return entry

    async def _open_leaf(self, definition: FileNode | RemoteNode | NullNode) -> Entry:
        name = definition.name
        self._table.check_free(name)
        driver, filename, device = await _open_device(definition)
        try:
            self._table.insert(name, device, driver, filename, definition.read_only)
        except BaseException:
            await device.close()
            raise
        return self._table.entry(name)

    async def _open_raw(self, definition: RawNode, undo: AsyncExitStack) -> Entry:
        child = await self._child(definition.child, definition.name, undo)
        device = _part(child.node, definition.offset, definition.size)
        node = Node(definition.name, device, definition.read_only)
        entry = Entry(node, "raw", child.filename, _nothing, (Child(child, "file"),))
        self._add(entry)
        return entry

    async def _open_copy_before_write(self, definition: CopyBeforeWriteNode, undo: AsyncExitStack) -> Entry:
        name = definition.name
        file = await self._child(definition.file, name, undo)
        self._table.check_free(name)
        target = await self._child(definition.target, name, undo)
        self._bitmap(definition, file)
        _check_target(file, target)
        cluster_bytes = _cluster_bytes(definition.cluster_bytes_min)
        base = slot(file.node)
        async with drained(base):
            # No await from here on: this is the point in time.
            bitmap = self._bitmap(definition, file)
            filter_ = _make_filter(definition, base, target.node, cluster_bytes, bitmap)

            async def release() -> None:
                async with drained(base):
                    if filter_ in base.filters:
                        base.remove(filter_)
                await filter_.wait_copies_ended()
                await filter_.block_copy.close()

            node = Node(name, file.node, definition.read_only)
            children = (Child(file, "file"), Child(target, "target"))
            entry = Entry(node, "copy-before-write", file.filename, release, children, filter=filter_)
            self._add(entry, base)
            base.push(filter_)
        logger.info("node %s: point in time of %s taken", name, base.name)
        return entry

    async def _open_snapshot_access(self, definition: SnapshotAccessNode, undo: AsyncExitStack) -> Entry:
        file = await self._child(definition.file, definition.name, undo)
        self._table.check_free(definition.name)
        if file.filter is None:
            raise UsageError(f"Node '{file.node.name}' has no point in time: give a copy-before-write node")
        target = next(child.entry for child in file.children if child.role == "target")
        access = SnapshotAccess(file.filter, target.node)
        # Not forbidden is discarding, which gives back what the target has saved.
        access.read_only = definition.read_only
        device = access if definition.unmap else IgnoreDiscard(access)
        node = Node(definition.name, device, definition.read_only)
        entry = Entry(node, SNAPSHOT_ACCESS, file.filename, _nothing, (Child(file, "file"),))
        self._add(entry)
        return entry

    def _add(self, entry: Entry, *held: Node) -> None:
        """List `entry`, unless somebody writes where that is no longer permitted."""
        name = entry.node.name
        self._table.check_free(name)
        # Children may have been deleted while others were opened.
        for child in entry.children:
            if child.entry.is_leaving or self._table.find(child.entry.node.name) is not child.entry:
                raise NotFoundError(f"Cannot find device='' nor node-name='{child.entry.node.name}'")
        try:
            with without_new_conflicts(self._table, held):
                self._table.add_entry(entry)
        except ConflictError:
            self._table.forget(entry)
            raise

    def _bitmap(self, definition: CopyBeforeWriteNode, file: Entry) -> DirtyBitmap | None:
        ref = definition.bitmap
        if ref is None:
            return None
        if self._table.find(ref.node) is None:
            raise NotFoundError(f"Node '{ref.node}' not found")
        found = self._table.find_bitmap(ref.node, ref.name)
        if found is None:
            raise NotFoundError(f"Dirty bitmap '{ref.name}' not found")
        if found.inconsistent:
            raise ConflictError(f"Bitmap '{ref.name}' is inconsistent and cannot be used")
        if found.size != file.node.size:
            raise UsageError(f"Bitmap '{ref.name}' and node '{file.node.name}' have different sizes")
        return found


async def _nothing() -> None:
    """A node that has nothing of its own."""


async def _open_device(definition: FileNode | RemoteNode | NullNode) -> tuple[str, str, BlockDevice]:
    """The driver's name, what people call the device, and the device."""
    match definition:
        case FileNode():
            return definition.driver, definition.filename, await _open_file(definition)
        case RemoteNode(export=export):
            uri = _uri(definition.address, export)
            options = RemoteOptions(reconnect_delay_s=definition.reconnect_delay_s)
            device = await NbdDevice.open(
                uri, read_only=definition.read_only, discard=definition.unmap, options=options
            )
            return "nbd", uri, device
        case NullNode(size=size):
            return "null-co", "null-co://", NullDevice(size, definition.read_only)


def _uri(address: InetAddress | SocketPath, export: str) -> str:
    if isinstance(address, SocketPath):
        return format_unix(address.path, export)
    return format_tcp(address.host, port_number(address), export)


def port_number(address: InetAddress) -> int:
    """The number of its port.

    Raises:
        UsageError: there is no such port.
    """
    text = address.port
    try:
        port = int(text) if text.isascii() and text.isdigit() else socket.getservbyname(text, "tcp")
    except (OSError, ValueError):
        port = PORT_MAX + 1
    if port > PORT_MAX:
        raise UsageError(f"address resolution failed for {address.host}:{text}: no such port")
    return port


async def _open_file(definition: FileNode) -> BlockDevice:
    path = definition.filename
    if is_remote(path):
        raise UsageError(f"{path} is no path: use the driver nbd for another server's export")

    async def attempt(read_only: bool) -> BlockDevice:
        return await open_device(
            path, "raw", read_only=read_only, discard=definition.unmap, lock=definition.lock
        )

    try:
        return await attempt(definition.read_only)
    except DeviceError as error:
        if not definition.auto_read_only or definition.read_only or error.errno not in _NOT_WRITABLE:
            raise
    return await attempt(read_only=True)


def _part(node: Node, offset: int | None, size: int | None) -> BlockDevice:
    """The part of `node` that a raw node is; `node` itself if neither is given."""
    if offset is None and size is None:
        return node
    start = offset or 0
    if start > node.size:
        raise UsageError(f"Offset ({start}) cannot be greater than size of the containing file ({node.size})")
    if size is not None and size > node.size - start:
        raise UsageError(
            f"The sum of offset ({start}) and size ({size}) has to be smaller or equal to the  "
            f"actual size of the containing file ({node.size})"
        )
    if size is not None and size % SECTOR_BYTES:
        raise UsageError(f"Specified size is not multiple of {SECTOR_BYTES}")
    length = node.size - start if size is None else size
    if not length:
        raise UsageError("a raw node of size 0 cannot be used: a disk needs at least one byte")
    return WindowDevice(node, start, length)


def _check_target(file: Entry, target: Entry) -> None:
    if target.reaches(file) or file.reaches(target) or slot(target.node) is slot(file.node):
        raise UsageError("Source and target cannot be the same")
    if target.node.read_only:
        raise ConflictError("Block node is read-only")
    if target.node.size != file.node.size:
        raise UsageError("Source and target image have different sizes")


def _cluster_bytes(at_least: int) -> int:
    if at_least & (at_least - 1):
        raise UsageError("min-cluster-size needs to be a power of 2")
    if at_least > CLUSTER_BYTES_MAX:
        raise UsageError(f"min-cluster-size too large: {at_least} > {CLUSTER_BYTES_MAX}")
    return max(CLUSTER_BYTES_DEFAULT, at_least)


def _make_filter(
    definition: CopyBeforeWriteNode,
    base: Node,
    target: Node,
    cluster_bytes: int,
    bitmap: DirtyBitmap | None,
) -> CopyBeforeWrite:
    block_copy = BlockCopy(base.child, target, cluster_bytes)
    if bitmap is not None:
        wanted = bitmap.clusters(cluster_bytes)
        rest = Extent(0, base.size)
        while rest.length and (unwanted := wanted.next_clear(rest)) is not None:
            block_copy.discard(unwanted)
            rest = Extent(unwanted.end, base.size - unwanted.end)
    return CopyBeforeWrite(
        base.child,
        block_copy,
        title=f"point in time of node {definition.name}",
        on_cbw_error=definition.on_cbw_error,
        cbw_timeout_s=definition.cbw_timeout_s,
    )
