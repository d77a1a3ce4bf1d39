"""Exports that come and go while the server runs, and the addresses that it listens on besides.

The daemon listens from its start; `nbd-server-start` adds one address, and `nbd-server-stop` takes it
away again together with the exports that were added since. All exports are offered at all addresses.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.node_bitmaps import check_usable
from nbdbackup.block.node import Node
from nbdbackup.block.write_through import WriteThrough
from nbdbackup.daemon.events import Announcer
from nbdbackup.daemon.graph import Graph
from nbdbackup.daemon.nodes.opening import port_number
from nbdbackup.daemon.nodes.table import Entry
from nbdbackup.daemon.nodes.writers import without_new_conflicts
from nbdbackup.errors import ConflictError, NotFoundError, UsageError
from nbdbackup.monitor.services_exports import ExportInfo, ExportRequest, ServerRequest
from nbdbackup.monitor.services_graph import BitmapRef, InetAddress
from nbdbackup.nbd.constants import STRING_BYTES_MAX
from nbdbackup.server.bitmap_context import BitmapContext, context_name
from nbdbackup.server.exports import Export
from nbdbackup.server.listener import Listener, listen_tcp, listen_unix
from nbdbackup.server.server import Server
from nbdbackup.tls.names import PeerName

logger = logging.getLogger(__name__)

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


@dataclass(slots=True, eq=False)
class Added:
    """An export that was added, from then until its last client is gone."""

    id: str
    export: Export
    entry: Entry | None
    bitmaps: Sequence[DirtyBitmap] = ()
    with_server: bool = False
    """Whether it goes when the added address does."""
    is_leaving: bool = False
    user: str = field(init=False)

    def __post_init__(self) -> None:
        self.user = f"export '{self.id}'"


class Exports:
    """Implements the monitor's `ExportService`."""

    def __init__(
        self,
        graph: Graph,
        server: Server,
        tasks: asyncio.TaskGroup,
        announcer: Announcer,
    ) -> None:
        self._graph = graph
        self._server = server
        self._tasks = tasks
        self._announcer = announcer
        # Changing while running.
        self._added: dict[str, Added] = {}
        self._listener: Listener | None = None

    def exports(self) -> Sequence[ExportInfo]:
        """Every export; those that the daemon was started with, and snapshots, have their names as ids."""
        infos = [ExportInfo(_id(export), export.node.name) for export in self._server.exports]
        leaving = [added for added in self._added.values() if added.is_leaving]
        return infos + [ExportInfo(added.id, added.export.node.name, True) for added in leaving]

    async def add(self, request: ExportRequest) -> None:
        """Offer a node."""
        if not self._server.listeners:
            raise ConflictError("NBD server not running")
        self._check_id(request.id)
        name = request.node if request.name is None else request.name
        entry = self._find_node(request.node)
        if request.writable and entry.node.read_only:
            raise ConflictError("Cannot export read-only node as writable")
        for what, text in (("export name", name), ("description", request.description)):
            if len(text.encode(errors="surrogatepass")) > STRING_BYTES_MAX:
                raise UsageError(f"{what} '{text}' too long")
        if any(export.name == name for export in self._server.exports):
            raise ConflictError(f"NBD server already has export named '{name}'")
        node = Node(request.node, WriteThrough(entry.node)) if request.writethrough else entry.node
        tls_only, authorised = self._access_to(entry)
        export = Export(
            name,
            node,
            request.description,
            read_only=not request.writable,
            tls_only=tls_only,
            authorised=authorised,
            id=request.id,
        )
        # Known before anything is changed: that it can be told to clients.
        export.info()
        bitmaps = self._take_bitmaps(request, entry)
        try:
            with without_new_conflicts(self._graph):
                self._server.exports.add(export)
        except ConflictError:
            self._server.exports.remove(name, "")
            for bitmap in bitmaps:
                bitmap.users.remove(_user(request.id))
            raise
        for bitmap in bitmaps:
            export.contexts.add(context_name(bitmap.name), BitmapContext(bitmap))
        self._added[request.id] = Added(request.id, export, entry, bitmaps, self._listener is not None)
        logger.info("export %s of node %s added", name, request.node)

    async def delete(self, export_id: str, *, hard: bool) -> None:
        """Withdraw the export; if it has clients, only when `hard`, and they are disconnected."""
        added = self._find(export_id)
        if added.export.clients and not hard:
            raise ConflictError(
                f"export '{export_id}' still in use: by {len(added.export.clients)} clients "
                "(mode 'hard' disconnects them)"
            )
        self._withdraw(added)
        if added.export.clients:
            # Its last requests may wait for a slow disk: nobody should wait for that here.
            self._tasks.create_task(self._finish(added), name=f"export-{export_id}")
        else:
            await self._finish(added)

    async def start_server(self, request: ServerRequest) -> None:
        """Listen at one more address."""
        if self._listener is not None:
            raise ConflictError("NBD server already running")
        listener = _listen(request)
        self._listener = listener
        self._server.add_listener(listener, request.clients_max, request.handshake_s or None)
        logger.info("listening on %s", listener.uri())

    async def stop_server(self) -> None:
        """End what `start_server` began, and the exports added since."""
        if self._listener is None:
            raise ConflictError("NBD server not running")
        listener, self._listener = self._listener, None
        ending = [added for added in self._added.values() if added.with_server and not added.is_leaving]
        for added in ending:
            self._withdraw(added)
        for added in ending:
            await self._finish(added)
        await self._server.remove_listener(listener)

    def _check_id(self, export_id: str) -> None:
        if not _WELL_FORMED.fullmatch(export_id):
            raise UsageError("Invalid block export id")
        if any(info.id == export_id for info in self.exports()):
            raise ConflictError(f"Block export id '{export_id}' is already in use")

    def _find_node(self, name: str) -> Entry:
        entry = self._graph.find(name)
        if entry is None or entry.is_leaving:
            raise NotFoundError(f"Cannot find device='' nor node-name='{name}'")
        return entry

    def _access_to(self, entry: Entry) -> tuple[bool, tuple[PeerName, ...] | None]:
        """`tls_only` and `authorised` of the node: those of whatever it is made of."""
        tls_only, authorised = self._server.exports.access_to(entry.node)
        for child in entry.children:
            child_tls_only, child_authorised = self._access_to(child.entry)
            tls_only = tls_only or child_tls_only
            if authorised is None:
                authorised = child_authorised
            elif child_authorised is not None:
                authorised = tuple(name for name in authorised if name in child_authorised)
        return tls_only, None if authorised is None else tuple(dict.fromkeys(authorised))

    def _find(self, export_id: str) -> Added:
        """The export that is offered as `export_id`, one that the daemon was started with included."""
        added = self._added.get(export_id)
        if added is not None and not added.is_leaving:
            return added
        for export in self._server.exports:
            if _id(export) == export_id:
                entry = next((e for e in self._graph.entries() if e.node is export.node), None)
                if entry is None:
                    raise ConflictError(
                        f"Export '{export_id}' belongs to a snapshot: x-nbdbackup-snapshot-drop ends both"
                    )
                return Added(export_id, export, entry)
        raise NotFoundError(f"Export '{export_id}' is not found")

    def _take_bitmaps(self, request: ExportRequest, entry: Entry) -> Sequence[DirtyBitmap]:
        """The bitmaps that the export shows, busy from now on."""
        taken: list[DirtyBitmap] = []
        try:
            for ref in request.bitmaps:
                bitmap = self._bitmap(ref, entry)
                _check_bitmap(bitmap, request, entry)
                bitmap.users.append(_user(request.id))
                taken.append(bitmap)
        except BaseException:
            for bitmap in taken:
                bitmap.users.remove(_user(request.id))
            raise
        return taken

    def _bitmap(self, ref: str | BitmapRef, entry: Entry) -> DirtyBitmap:
        if isinstance(ref, BitmapRef):
            if self._graph.find(ref.node) is None:
                raise NotFoundError(f"Node '{ref.node}' not found")
            found = self._graph.find_bitmap(ref.node, ref.name)
            if found is None:
                raise NotFoundError(f"Dirty bitmap '{ref.name}' not found")
            return found
        for name in _names_of(entry):
            found = self._graph.find_bitmap(name, ref)
            if found is not None:
                return found
        raise NotFoundError(f"Bitmap '{ref}' is not found")

    def _withdraw(self, added: Added) -> None:
        """Offer it no longer and disconnect its clients. `_finish` must follow."""
        added.is_leaving = True
        self._added[added.id] = added
        if added.entry is not None:
            added.entry.users.append(added.user)
        self._server.exports.remove(added.export.name, f"export {added.export.name} was deleted")

    async def _finish(self, added: Added) -> None:
        """Its clients are gone, and so is the export."""
        await added.export.wait_unused()
        for bitmap in added.bitmaps:
            bitmap.users.remove(added.user)
        if added.entry is not None:
            added.entry.users.remove(added.user)
        del self._added[added.id]
        logger.info("export %s deleted", added.export.name)
        self._announcer.export_deleted(added.id)


def _id(export: Export) -> str:
    return export.id or export.name


def _user(export_id: str) -> str:
    return f"export '{export_id}'"


def _names_of(entry: Entry) -> list[str]:
    """The node's name, and those of the nodes that it is only another name for."""
    names = [entry.node.name]
    while isinstance(entry.node.root, Node):
        entry = entry.children[0].entry
        names.append(entry.node.name)
    return names


def _check_bitmap(bitmap: DirtyBitmap, request: ExportRequest, entry: Entry) -> None:
    if not request.writable and not entry.node.read_only and bitmap.enabled:
        raise ConflictError(f"Enabled bitmap '{bitmap}' incompatible with readonly export")
    check_usable(bitmap)
    if bitmap.size != entry.node.size:
        raise UsageError(f"Bitmap '{bitmap}' and node '{entry.node.name}' have different sizes")


def _listen(request: ServerRequest) -> Listener:
    address = request.address
    if not isinstance(address, InetAddress):
        return listen_unix(address.path)
    return listen_tcp(address.host or "0.0.0.0", port_number(address))
