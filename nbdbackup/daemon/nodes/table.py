"""Every node of the daemon by its name, what it is made of, and what needs it."""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.node_bitmaps import NodeBitmaps
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node
from nbdbackup.block.write_through import WriteThrough
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite
from nbdbackup.server.exports import Export, ExportTable


class Child(msgspec.Struct, frozen=True, eq=False):
    """What a node uses `entry` as: its "file", where its bytes are, or the "target" of what it saves."""

    entry: "Entry"
    role: str


@dataclass(slots=True, eq=False)
class Entry:
    """A node and where it came from. `users` changes while running: who needs it, in words."""

    node: Node
    driver: str
    filename: str
    release: Callable[[], Awaitable[None]]
    """Give up what the node has of its own; its children are not."""
    children: tuple[Child, ...] = ()
    owner: str | None = None
    """The node that it was defined inside of, and goes with."""
    filter: CopyBeforeWrite | None = None
    """Of a copy-before-write node."""
    users: list[str] = field(default_factory=list)
    is_leaving: bool = False
    bitmaps: NodeBitmaps = field(init=False)

    def __post_init__(self) -> None:
        self.bitmaps = NodeBitmaps(self.node.name, self.node.size)

    def reaches(self, other: "Entry") -> bool:
        """Whether what is written here can arrive at `other`."""
        return self is other or any(child.entry.reaches(other) for child in self.children)


class NodeWatcher(Protocol):
    """Whoever keeps something of nodes that outlives them."""

    async def load(self, entry: "Entry") -> None:
        """The node is new, and nobody can use it yet.

        Raises:
            NbdBackupError, OSError: it cannot be had.
        """

    async def release(self, entry: "Entry") -> None:
        """The node goes, and nothing uses it any more. Must not fail."""


class NodeTable:
    """The nodes in the order they were made: each after its children."""

    def __init__(self, exports: ExportTable) -> None:
        self.watchers: list[NodeWatcher] = []
        """Are told of nodes that come, and the last one first of those that go, by command."""
        self._exports = exports
        self._entries: dict[str, Entry] = {}
        self._names_made = 0

    def __iter__(self) -> Iterator[Node]:
        return iter([entry.node for entry in self._entries.values()])

    def entries(self) -> Sequence[Entry]:
        """Every node, in the order they were made."""
        return list(self._entries.values())

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

    def find(self, name: str) -> Entry | None:
        """As `entry`; None if there is none."""
        return self._entries.get(name)

    def find_bitmap(self, node: str, name: str) -> DirtyBitmap | None:
        """The dirty bitmap `name` of the node called `node`, if there are both."""
        entry = self.find(node)
        return None if entry is None else entry.bitmaps.find(name)

    def new_name(self) -> str:
        """A name for a node that was given none."""
        self._names_made += 1
        return f"#block{self._names_made:03}"

    def check_free(self, name: str) -> None:
        """Raises ConflictError if there is a node called `name`."""
        if name in self._entries:
            raise ConflictError(f"Duplicate nodes with node-name='{name}'")

    def insert(self, name: str, device: BlockDevice, driver: str, filename: str, read_only: bool) -> Node:
        """Make the node `name` of `device`, which is the graph's to close from now on."""
        self.check_free(name)
        node = Node(name, device, read_only)
        self.add_entry(Entry(node, driver, filename, lambda: _flush_and_close(device)))
        return node

    def add_entry(self, entry: Entry) -> None:
        """List `entry`, whose name is free."""
        self.check_free(entry.node.name)
        self._entries[entry.node.name] = entry

    def forget(self, entry: Entry) -> None:
        """Undo `add_entry`; nothing is closed."""
        if self._entries.get(entry.node.name) is entry:
            del self._entries[entry.node.name]

    def parents(self, entry: Entry) -> list[tuple[Entry, Child]]:
        """The nodes that `entry` is a child of; one that has it twice comes twice."""
        return [
            (parent, child)
            for parent in self._entries.values()
            for child in parent.children
            if child.entry is entry
        ]

    def exports_of(self, entry: Entry) -> list[Export]:
        """The exports of the node."""
        return [export for export in self._exports if exported_node(export) is entry.node]

    async def take_out(self, entry: Entry) -> None:
        """Close `entry`, which nothing uses, and what was defined inside of it; then they are gone."""
        if self.find(entry.node.name) is not entry:
            return
        entry.is_leaving = True
        for watcher in reversed(self.watchers):
            await watcher.release(entry)
        async with AsyncExitStack() as stack:
            for child in dict.fromkeys(child.entry for child in entry.children):
                if child.owner == entry.node.name:
                    stack.push_async_callback(self.take_out, child)
            stack.callback(self.forget, entry)
            stack.push_async_callback(entry.release)

    async def close(self) -> None:
        """Flush and close every node; nothing may be in flight. Those that could be are gone then.

        Raises:
            OSError: one could not be flushed or closed; the others were none the less.
        """
        closing: dict[Entry, asyncio.Task[None]] = {}
        # At once: a disk that hangs must not keep the others from being flushed. But each after its parents.
        for entry in reversed(self._entries.values()):
            parents = [closing[parent] for parent, _ in self.parents(entry)]
            closing[entry] = asyncio.create_task(self._close(entry, parents))
        outcomes = await asyncio.gather(*closing.values(), return_exceptions=True)
        for outcome in reversed(outcomes):
            if outcome is not None:
                raise outcome

    async def _close(self, entry: Entry, parents: "Sequence[asyncio.Task[None]]") -> None:
        if parents:
            await asyncio.wait(parents)
        name = entry.node.name
        try:
            await entry.release()
        except DeviceError:
            raise
        except OSError as error:
            raise DeviceError(
                error.errno or errno.EIO,
                f"{name} could not be flushed, and what was written to it may be lost: "
                f"{error.strerror or error}",
            ) from error
        # Only now: until it is flushed, it counts as open.
        self.forget(entry)


def exported_node(export: Export) -> Node:
    """The node that `export` offers, under whatever the export itself puts on top."""
    below = export.node.root
    if isinstance(below, WriteThrough) and isinstance(below.child, Node):
        return below.child
    return export.node


def slot(node: Node) -> Node:
    """The node that `node` is only another name for: every write to either is seen there."""
    while isinstance(node.root, Node):
        node = node.root
    return node


async def _flush_and_close(device: BlockDevice) -> None:
    try:
        if not device.read_only:
            await device.flush()
    finally:
        await device.close()
