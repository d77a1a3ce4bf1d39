"""Exports: nodes offered under a name over NBD, and who is connected to each."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbdbackup.block.node import Node
from nbdbackup.errors import ConflictError, NotFoundError
from nbdbackup.nbd.agreement import ExportInfo
from nbdbackup.nbd.constants import TransmissionFlags
from nbdbackup.server.contexts import ContextTable


class Client(Protocol):
    """What an export knows of a connection."""

    def disconnect(self, reason: str) -> None:
        """End the connection soon, without waiting for the client."""


@dataclass(slots=True, eq=False)
class Export:
    """`node` under `name`. `clients` and `contexts` change while running."""

    name: str
    node: Node
    description: str = ""
    read_only: bool = False
    tls_only: bool = False
    """Shown to clients with TLS alone; so is every snapshot of it."""
    id: str = ""
    """What QMP calls it; "": as its name."""
    clients: set[Client] = field(default_factory=set)
    contexts: ContextTable = field(init=False)
    """What BLOCK_STATUS can tell of it."""
    _unused: asyncio.Event = field(default_factory=asyncio.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        self.contexts = ContextTable(self.node)
        self._unused.set()

    def join(self, client: Client) -> None:
        """`client` uses it from now on."""
        self.clients.add(client)
        self._unused.clear()

    def leave(self, client: Client) -> None:
        """`client` uses it no longer, and has nothing in flight."""
        self.clients.discard(client)
        if not self.clients:
            self._unused.set()

    async def wait_unused(self) -> None:
        """Return when it has no client."""
        await self._unused.wait()

    def info(self) -> ExportInfo:
        """What negotiation tells a client."""
        return ExportInfo(
            self.name,
            self.description,
            self.node.size,
            self._flags(),
            contexts=self.contexts.names,
            tls_only=self.tls_only,
            wide_contexts=self.contexts.wide_names,
        )

    def _flags(self) -> TransmissionFlags:
        features = self.node.features
        # Multi-conn: every connection uses the one device, and a flush of it covers all (57).
        flags = (
            TransmissionFlags.HAS_FLAGS
            | TransmissionFlags.SEND_FLUSH
            | TransmissionFlags.SEND_FUA
            | TransmissionFlags.SEND_DF
            | TransmissionFlags.CAN_MULTI_CONN
            | TransmissionFlags.SEND_CACHE
        )
        if features.rotational:
            flags |= TransmissionFlags.ROTATIONAL
        if self.read_only or self.node.read_only:
            return flags | TransmissionFlags.READ_ONLY
        flags |= TransmissionFlags.SEND_TRIM | TransmissionFlags.SEND_WRITE_ZEROES
        if features.fast_zero:
            flags |= TransmissionFlags.SEND_FAST_ZERO
        return flags


class ExportTable:
    """All exports in the order they were added; the first is also the default export, ""."""

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}

    def __iter__(self) -> Iterator[Export]:
        return iter(tuple(self._exports.values()))

    def add(self, export: Export) -> None:
        """Offer `export`.

        Raises:
            ConflictError: there is one of that name.
            UsageError: its name or description is nothing that can be told to a client.
        """
        export.info()
        if export.name in self._exports:
            raise ConflictError(f"there is an export called {export.name!r} already")
        self._exports[export.name] = export

    def get(self, name: str) -> Export:
        """The export called `name` ("": the default one).

        Raises:
            NotFoundError: there is none.
        """
        if not name and self._exports:
            return next(iter(self._exports.values()))
        try:
            return self._exports[name]
        except KeyError:
            raise NotFoundError(f"there is no export called {name!r}") from None

    def remove(self, name: str, reason: str) -> None:
        """Stop offering it and disconnect its clients, telling the log `reason`."""
        export = self._exports.pop(name)
        for client in tuple(export.clients):
            client.disconnect(reason)

    # What negotiation asks (nbd.agreement.ExportCatalog).

    def exports(self) -> Sequence[ExportInfo]:
        """What LIST shows."""
        return [export.info() for export in self]

    def find(self, name: str) -> ExportInfo | None:
        """What INFO and GO find."""
        try:
            return self.get(name).info()
        except NotFoundError:
            return None
