"""Asking a server over a socket what it has: moves bytes between it and `nbd.client_inquiry`."""

import asyncio

from nbdbackup.block.nbd_connection import Limits, connected_socket, plain_uri
from nbdbackup.block.nbd_session import RemoteOptions, RemoteSession, cannot_connect
from nbdbackup.errors import NbdBackupError
from nbdbackup.nbd.client import RemoteExport
from nbdbackup.nbd.client_inquiry import ClientInquiry
from nbdbackup.nbd.uri import NbdUri

RECEIVE_BYTES = 64 << 10


async def list_exports(uri: str) -> ClientInquiry:
    """Every export of the server at `uri`, whose own export name does not matter, with its meta contexts.

    Raises:
        UsageError, NotFoundError, DeviceError: see `NbdDevice.open`.
        ProtocolError: the server does not list its exports, or breaks the protocol.
    """
    return await _ask(plain_uri(uri), ClientInquiry())


async def list_contexts(uri: str) -> list[str]:
    """The names of the meta contexts of the export at `uri`.

    Raises: as `list_exports`.
    """
    parsed = plain_uri(uri)
    inquiry = await _ask(parsed, ClientInquiry((parsed.export,)))
    return inquiry.contexts.get(parsed.export, [])


async def describe(uri: str) -> RemoteExport:
    """What the server says about the export at `uri` when it is chosen.

    Raises: as `list_exports`.
    """
    session = RemoteSession(plain_uri(uri), RemoteOptions(reconnect_delay_s=0, connections_max=1))
    await session.open()
    await session.close()
    return session.export


async def _ask(uri: NbdUri, inquiry: ClientInquiry) -> ClientInquiry:
    limit_s = Limits().connect_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            await _converse(uri, inquiry)
    except TimeoutError:
        raise cannot_connect(uri, TimeoutError(f"no answer within {limit_s:g} s")) from None
    except (OSError, NbdBackupError) as error:
        raise cannot_connect(uri, error) from error
    return inquiry


async def _converse(uri: NbdUri, inquiry: ClientInquiry) -> None:
    loop = asyncio.get_running_loop()
    with await connected_socket(uri) as sock:
        while not inquiry.is_over:
            data = await loop.sock_recv(sock, RECEIVE_BYTES)
            if not data:
                raise inquiry.closed()
            await loop.sock_sendall(sock, inquiry.receive(data))
