"""Being a service of systemd, or of whoever speaks its two small protocols.

Socket activation, sd_listen_fds(3): LISTEN_FDS listening sockets were opened for us, from
descriptor 3 on. Notification, sd_notify(3): how things are goes to NOTIFY_SOCKET, and with
WATCHDOG_USEC a sign of life in that time, or we are killed and started again; it is sent by the
event loop that serves the clients, so that it proves what it says.
"""

import asyncio
import os
import socket
from collections.abc import Callable, MutableMapping

from nbdbackup.daemon.options import InheritedSocket
from nbdbackup.errors import UsageError

FIRST_DESCRIPTOR = 3
SOCKETS_MAX = 256
STATUS_INTERVAL_S = 30.0


def take_inherited_sockets(environment: MutableMapping[str, str]) -> tuple[InheritedSocket, ...]:
    """The sockets that were opened for this process; what tells of them is taken out of `environment`.

    So nothing that is started later takes them for its own.

    Raises:
        UsageError: LISTEN_FDS is no number of sockets.
    """
    count = environment.pop("LISTEN_FDS", "")
    process = environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if not count or process != str(os.getpid()):
        return ()
    if not count.isascii() or not count.isdigit() or not 0 < int(count) <= SOCKETS_MAX:
        raise UsageError(f"LISTEN_FDS is '{count[:20]}', no number of sockets from 1 to {SOCKETS_MAX}")
    names += [""] * (int(count) - len(names))
    return tuple(InheritedSocket(FIRST_DESCRIPTOR + index, names[index]) for index in range(int(count)))


def notify(state: str) -> None:
    """Send `state` ("READY=1") to NOTIFY_SOCKET, if there is one; nobody minds if that fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # A manager that does not read must not hold up the clients.
        sock.setblocking(False)
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return


def watchdog_interval_s() -> float | None:
    """How often to give a sign of life: twice in the time that WATCHDOG_USEC allows. None: nobody waits."""
    allowed = os.environ.get("WATCHDOG_USEC", "")
    process = os.environ.get("WATCHDOG_PID", "")
    if not allowed.isascii() or not allowed.isdigit() or not int(allowed):
        return None
    if process and process != str(os.getpid()):
        return None
    return int(allowed) / 2_000_000


async def keep_notifying(status: Callable[[], str]) -> None:
    """Send `status()`, a line for people, and signs of life, until cancelled."""
    interval_s = watchdog_interval_s()
    sign_of_life = "" if interval_s is None else "\nWATCHDOG=1"
    while True:
        notify(f"STATUS={status()}{sign_of_life}")
        await asyncio.sleep(min(STATUS_INTERVAL_S, interval_s or STATUS_INTERVAL_S))
