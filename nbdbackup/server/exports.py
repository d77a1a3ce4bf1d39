"""Exports: nodes offered under a name over NBD, who may see each, and who is connected to it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbdbackup.block.node import Node
from nbdbackup.errors import ConflictError, NotFoundError
from nbdbackup.nbd.agreement import ExportInfo
from nbdbackup.nbd.constants import TransmissionFlags
from nbdbackup.server.contexts import ContextTable
from nbdbackup.tls.names import PeerName, is_authorised

logger = logging.getLogger(__name__)


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
    authorised: tuple[PeerName, ...] | None = None
    """Shown to these alone, and so is every snapshot of it; None: to whoever comes in."""
    all_bitmaps: bool = False
    """Every dirty bitmap of the node is a meta context of it, as they come and go."""
    clients: set[Client] = field(default_factory=set)
    contexts: ContextTable = field(init=False)
    """What BLOCK_STATUS can tell of it."""

    def __post_init__(self) -> None:
        self.contexts = ContextTable(self.node)

    def info(self) -> ExportInfo:
        """What negotiation tells a client."""
        return ExportInfo(
            self.name,
            self.description,
            self.node.size,
            self._flags(),
            contexts=self.contexts.names,
            tls_only=self.tls_only or self.authorised is not None,
            wide_contexts=self.contexts.wide_names,
        )

    def is_for(self, client: PeerName | None) -> bool:
        """Whether it is shown to `client`, who it has proved to be by TLS (None: nobody in particular)."""
        return self.authorised is None or is_authorised(client, self.authorised)

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

    def __contains__(self, name: str) -> bool:
        return name in self._exports

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

    def access_to(self, node: Node) -> tuple[bool, tuple[PeerName, ...] | None]:
        """`tls_only` and `authorised` of what shows the same bytes as `node`, such as a snapshot of it.

        Whom one export of `node` is for may see it; an export for everybody opens it to everybody.
        """
        of_node = [export for export in self if export.node is node]
        lists = [export.authorised for export in of_node if export.authorised is not None]
        tls_only = any(export.tls_only for export in of_node)
        if not lists or len(lists) < len(of_node):
            return tls_only, None
        return tls_only, tuple(name for names in lists for name in names)

    def remove(self, name: str, reason: str) -> None:
        """Stop offering it and disconnect its clients, telling the log `reason`."""
        export = self._exports.pop(name)
        for client in tuple(export.clients):
            client.disconnect(reason)


class ClientCatalog:
    """What one client is shown of `table` (nbd.agreement.ExportCatalog).

    An export that is not for this client is not there for it: LIST leaves it out, and INFO, GO and the
    others get the very answer of a name that does not exist. NBD_REP_ERR_POLICY ("you may not") would
    tell everybody who guesses a name that it is one.

    Until the client has done TLS nobody knows who it is, and an export for some is one for TLS alone:
    negotiation then leaves it out, too, or answers ERR_TLS_REQD, as the specification wants it.
    """

    def __init__(self, table: ExportTable) -> None:
        self._table = table
        self._is_identified = False
        self._client: PeerName | None = None

    def identify(self, client: PeerName | None) -> None:
        """TLS is done, and the client has proved to be `client`, or nobody in particular."""
        self._is_identified = True
        self._client = client

    def exports(self) -> Sequence[ExportInfo]:
        """What LIST shows."""
        return [export.info() for export in self._table if self._shows(export)]

    def find(self, name: str) -> ExportInfo | None:
        """What INFO and GO find."""
        try:
            export = self._table.get(name)
        except NotFoundError:
            return None
        if not self._shows(export):
            # The client is told nothing; whoever wonders why reads it here.
            who = self._client if self._client is not None else "a client without a name"
            logger.info("export %s is hidden from %s (--export-authz)", export.name, who)
            return None
        return export.info()

    def _shows(self, export: Export) -> bool:
        return not self._is_identified or export.is_for(self._client)
