"""One request of the transmission phase, as the server role handles it, and why one is refused.

Plain tuples: one is made for every request of a busy client.
"""

from typing import NamedTuple

from nbdbackup.nbd.constants import Errno


class Request(NamedTuple):
    """One request's head. `flags` and `command` are plain numbers: they may be unknown ones."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class StatusQuery(NamedTuple):
    """A BLOCK_STATUS whose payload named `context_ids`; `request` has the length that it told."""

    request: Request
    context_ids: tuple[int, ...]


class Refusal(NamedTuple):
    """Why a request is not carried out, or failed at `offset` (bytes, None: not known where)."""

    error: Errno
    text: str
    offset: int | None = None
