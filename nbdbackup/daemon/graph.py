"""Every node of the daemon by its name, and what each is used for."""

import asyncio
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.node_bitmaps import NodeBitmaps
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node
from nbdbackup.block.open import open_device
from nbdbackup.daemon.bitmap_info import bitmap_infos
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError, UsageError
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.monitor.context import ExportInfo, FileNode, NodeInfo, RawNode
from nbdbackup.nbd import uri as nbd_uri
from nbdbackup.server.exports import ExportTable

LOOPBACK = ("localhost", "127.0.0.1", "::1")

BLOCK_BYTES = 512
"""The unit of `st_blocks`."""


@dataclass(slots=True, eq=False)
class Entry:
    """A node and where it came from. `users` changes while running: who needs it, in words."""

    node: Node
    driver: str
    filename: str
    child: str | None = None
    users: list[str] = field(default_factory=list)
    bitmaps: NodeBitmaps = field(init=False)

    def __post_init__(self) -> None:
        self.bitmaps = NodeBitmaps(self.node.name, self.node.size)


class NodeWatcher(Protocol):
    """Whoever keeps something of nodes that outlives them."""

    async def load(self, entry: Entry) -> None:
        """The node is new, and nobody can use it yet.

        Raises:
            NbdBackupError, OSError: it cannot be had.
        """

    async def release(self, entry: Entry) -> None:
        """The node goes, and nothing uses it any more. Must not fail."""


class Graph:
    """The nodes; implements the monitor's `GraphService`."""

    def __init__(self, exports: ExportTable) -> None:
        self._exports = exports
        self.watcher: NodeWatcher | None = None
        """Is told of nodes that come and go by command."""
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter([entry.node for entry in self._entries.values()])

    def get(self, name: str) -> Node:
        """The node called `name`.

        Raises:
            NotFoundError: there is none.
        """
        return self.entry(name).node

    def entry(self, name: str) -> Entry:
        """As `get`, with what else is known of it."""
        try:
            return self._entries[name]
        except KeyError:
            raise NotFoundError(f"Cannot find device='{name}' nor node-name='{name}'") from None

    def find_bitmap(self, node: Node, name: str) -> DirtyBitmap | None:
        """The bitmap of `node` that is called `name`, if there is one."""
        return self.entry(node.name).bitmaps.find(name)

    def insert(self, name: str, device: BlockDevice, driver: str, filename: str, read_only: bool) -> Node:
        """Make the node `name` of `device`, which is the graph's to close from now on."""
        self.check_free(name)
        node = Node(name, device, read_only)
        self._entries[name] = Entry(node, driver, filename)
        return node

    def check_free(self, name: str) -> None:
        """Raises ConflictError if there is a node called `name`."""
        if name in self._entries:
            raise ConflictError(f"Duplicate nodes with node-name='{name}'")

    # GraphService.

    def nodes(self) -> Sequence[NodeInfo]:
        """Every node, in the order they were made."""
        return [self._info(entry) for entry in self._entries.values()]

    def exports(self) -> Sequence[ExportInfo]:
        """Every export."""
        return [ExportInfo(export.name, export.node.name) for export in self._exports]

    async def add(self, node: FileNode | RawNode) -> None:
        """Open a node."""
        self.check_free(node.name)
        if isinstance(node, RawNode):
            child = self.entry(node.child)
            self.insert(node.name, child.node, "raw", child.filename, node.read_only)
            self._entries[node.name].child = node.child
            child.users.append(f"node '{node.name}'")
            await self._load(node.name)
            return
        device = await open_device(node.filename, "raw", read_only=node.read_only, discard=node.unmap)
        try:
            self.insert(node.name, device, node.driver, node.filename, node.read_only)
        except BaseException:
            await device.close()
            raise
        await self._load(node.name)

    async def _load(self, name: str) -> None:
        if self.watcher is None:
            return
        try:
            await self.watcher.load(self._entries[name])
        except BaseException:
            await self.delete(name)
            raise

    async def delete(self, name: str) -> None:
        """Close the node `name`, which nothing may use."""
        if name not in self._entries:
            raise NotFoundError(f"Failed to find node with node-name='{name}'")
        entry = self.entry(name)
        users = entry.users + [f"export '{e.name}'" for e in self._exports if e.node is entry.node]
        # Bitmaps go with their node; what uses one of them uses the node as well.
        if users or any(not isinstance(device, DirtyTracker) for device in entry.node.filters):
            raise ConflictError(f"Node {name} is in use{': by ' + ', '.join(users) if users else ''}")
        del self._entries[name]
        if self.watcher is not None:
            await self.watcher.release(entry)
        if entry.child is not None:
            self.entry(entry.child).users.remove(f"node '{name}'")
        else:
            await entry.node.root.close()

    async def close(self) -> None:
        """Flush and close every node; nothing may be in flight. Those that could be are gone then.

        Raises:
            OSError: one could not be flushed or closed; the others were none the less.
        """
        # At once: a disk that hangs must not keep the others from being flushed.
        closing = [self._close(name, entry) for name, entry in self._entries.items()]
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _close(self, name: str, entry: Entry) -> None:
        try:
            if entry.child is None:
                await _flush_and_close(entry.node.root)
        except DeviceError:
            raise
        except OSError as error:
            raise DeviceError(
                error.errno or errno.EIO,
                f"{name} could not be flushed, and what was written to it may be lost: "
                f"{error.strerror or error}",
            ) from error
        # Only now: until it is flushed, it counts as open.
        del self._entries[name]

    def _info(self, entry: Entry) -> NodeInfo:
        node = entry.node
        return NodeInfo(
            node.name,
            entry.driver,
            entry.filename,
            node.size,
            node.read_only,
            _allocated(node.root),
            bitmap_infos(entry.bitmaps),
        )


async def _flush_and_close(device: BlockDevice) -> None:
    try:
        if not device.read_only:
            await device.flush()
    finally:
        await device.close()


def refuse_same_file(source: BlockDevice, path: str) -> None:
    """Raises UsageError if `path` is the file or block device that `source` is made of."""
    fd = _bottom(source).offload_fd()
    if fd is None:
        return
    try:
        theirs = os.stat(path)
    except OSError:
        return
    ours = os.fstat(fd)
    same_device = ours.st_rdev and ours.st_rdev == theirs.st_rdev
    if os.path.samestat(ours, theirs) or same_device:
        raise UsageError("Source and target cannot be the same")


def is_same_server(uri: str, own: str) -> bool:
    """Whether `uri` leads to the listener of this machine whose URI is `own`."""
    one, other = nbd_uri.parse(uri), nbd_uri.parse(own)
    if one.socket_path is not None and other.socket_path is not None:
        return os.path.realpath(one.socket_path) == os.path.realpath(other.socket_path)
    if one.host is None or other.host is None or one.port != other.port:
        return False
    return one.host in (other.host, *LOOPBACK)


def _allocated(device: BlockDevice) -> int | None:
    fd = _bottom(device).offload_fd()
    return None if fd is None else os.fstat(fd).st_blocks * BLOCK_BYTES


def _bottom(device: BlockDevice) -> BlockDevice:
    return device.bottom if isinstance(device, Node) else device
