"""The graph as the monitor's commands see it: nodes are added, listed and deleted by name."""

import os
import re
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.block.write_threshold import WriteThreshold
from nbdbackup.daemon.bitmap_info import bitmap_infos
from nbdbackup.daemon.events import Announcer
from nbdbackup.daemon.nodes.opening import NodeOpener
from nbdbackup.daemon.nodes.table import Entry, NodeTable
from nbdbackup.daemon.nodes.writers import check_point_in_time
from nbdbackup.errors import ConflictError, NotFoundError, UsageError
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.job.target import BACKUP_USER
from nbdbackup.monitor.services_graph import (
    CopyBeforeWriteNode,
    NodeDefinition,
    NodeInfo,
    NodeRef,
    RawNode,
    SnapshotAccessNode,
)
from nbdbackup.nbd import uri as nbd_uri
from nbdbackup.server.exports import ExportTable

__all__ = ["Entry", "Graph", "is_same_server", "refuse_same_file"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")

BLOCK_BYTES = 512
"""The unit of `st_blocks`."""
NAME_CHARACTERS_MAX = 31
"""QEMU's; a new node with a longer name is refused, so that scripts work with both."""
_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


class Graph(NodeTable):
    """The nodes; implements the monitor's `GraphService`."""

    def __init__(self, exports: ExportTable, announcer: Announcer | None = None) -> None:
        super().__init__(exports)
        self.announcer = announcer or Announcer()
        self._opener = NodeOpener(self)

    def nodes(self) -> Sequence[NodeInfo]:
        """Every node, in the order they were made."""
        return [self._info(entry) for entry in self.entries()]

    async def add(self, node: NodeDefinition) -> None:
        """Open a node."""
        await self._opener.open(self._named(node))

    async def delete(self, name: str) -> None:
        """Close the node `name`, which nothing may use."""
        entry = self.find(name)
        if entry is None or entry.is_leaving:
            raise NotFoundError(f"Failed to find node with node-name='{name}'")
        exports = [f"export '{export.name}'" for export in self.exports_of(entry)]
        if exports:
            raise ConflictError(f"Node {name} is in use: by {', '.join(exports)}")
        if entry.owner is not None:
            raise ConflictError(f"Node {name} is not owned by the monitor: it goes with '{entry.owner}'")
        if BACKUP_USER in entry.users:
            raise ConflictError(f"Node '{name}' is busy: block device is in use by block job: backup")
        users = [f"node '{parent.node.name}'" for parent, _ in self.parents(entry)] + entry.users
        # Bitmaps and a threshold go with their node; what uses a bitmap uses the node as well.
        if users or any(
            not isinstance(device, DirtyTracker | WriteThreshold) for device in entry.node.filters
        ):
            raise ConflictError(f"Block device {name} is in use{': by ' + ', '.join(users) if users else ''}")
        await self.take_out(entry)

    def check_point_in_time(self, node: Node) -> None:
        """Raise ConflictError if a point in time of `node` could be written past."""
        check_point_in_time(self, node)

    async def set_write_threshold(self, name: str, threshold: int) -> None:
        """Tell once that a write ends behind byte `threshold` of the node; 0: do not."""
        entry = self.find(name)
        if entry is None or entry.is_leaving:
            raise NotFoundError(f"Device '{name}' not found")
        node = entry.node
        async with drained(node):
            for device in node.filters:
                if isinstance(device, WriteThreshold):
                    node.remove(device)
            if threshold and not entry.is_leaving:
                node.push(WriteThreshold(node.child, threshold, self._announce_threshold(name)))

    def _announce_threshold(self, name: str) -> Callable[[int, int], None]:
        def announce(amount: int, threshold: int) -> None:
            self.announcer.threshold_exceeded(name, amount, threshold)

        return announce

    def _named(self, node: NodeDefinition) -> NodeDefinition:
        """`node` with names for what was defined inside of it without one."""
        _check_name(node.name)
        match node:
            case RawNode(child=child):
                return replace(node, child=self._named_ref(child))
            case CopyBeforeWriteNode(file=file, target=target):
                return replace(node, file=self._named_ref(file), target=self._named_ref(target))
            case SnapshotAccessNode(file=file):
                return replace(node, file=self._named_ref(file))
            case _:
                return node

    def _named_ref(self, ref: NodeRef) -> NodeRef:
        if isinstance(ref, str):
            return ref
        if ref.name:
            return self._named(ref)
        name = self.new_name()
        return replace(self._named(replace(ref, name="unnamed")), name=name)

    def _info(self, entry: Entry) -> NodeInfo:
        node = entry.node
        threshold = [device.threshold for device in node.filters if isinstance(device, WriteThreshold)]
        return NodeInfo(
            node.name,
            entry.driver,
            entry.filename,
            node.size,
            node.read_only,
            _allocated(node.root),
            threshold[0] if threshold else 0,
            tuple((child.role, child.entry.node.name) for child in entry.children),
            self._info(entry.children[0].entry) if entry.filter is not None else None,
            bitmap_infos(entry.bitmaps),
        )


def _check_name(name: str) -> None:
    if not _WELL_FORMED.fullmatch(name):
        raise UsageError(f"Invalid node-name: '{name}'")
    if len(name) > NAME_CHARACTERS_MAX:
        raise UsageError("Node name too long")


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
