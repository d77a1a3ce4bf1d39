"""Exports and the NBD server's additional listeners, as commands ask for them."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from nbdbackup.monitor.services_graph import BitmapRef, InetAddress, SocketPath


class ServerRequest(msgspec.Struct, frozen=True):
    """Listen at `address` as well (port "0": any). `clients_max` 0: no limit; `handshake_s` 0: none."""

    address: InetAddress | SocketPath
    clients_max: int
    handshake_s: int


class ExportRequest(msgspec.Struct, frozen=True):
    """Offer the node `node` as the export `name`."""

    id: str
    node: str
    name: str | None = None
    """None: as the node."""
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    bitmaps: tuple[str | BitmapRef, ...] = ()


class ExportInfo(msgspec.Struct, frozen=True):
    """An NBD export."""

    id: str
    node: str
    shutting_down: bool = False


class ExportService(Protocol):
    """Exports, and where they are offered beside the addresses that the daemon was started with."""

    def exports(self) -> Sequence[ExportInfo]:
        """Every export."""

    async def add(self, request: ExportRequest) -> None:
        """Offer a node."""

    async def delete(self, export_id: str, *, hard: bool) -> None:
        """Withdraw the export; if it has clients, only when `hard`, and they are disconnected."""

    async def start_server(self, request: ServerRequest) -> None:
        """Listen at one more address."""

    async def stop_server(self) -> None:
        """End what `start_server` began, and the exports added since."""
