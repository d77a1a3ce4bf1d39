"""Telling the service manager how things are, by the protocol of sd_notify(3)."""

import os
import socket


def notify(state: str) -> None:
    """Send `state` ("READY=1") to NOTIFY_SOCKET, if there is one; nobody minds if that fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return
