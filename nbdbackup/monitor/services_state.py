"""What the commands about the state directory ask for, and what they are told."""

from collections.abc import Sequence
from typing import Protocol

import msgspec


class LeftoverInfo(msgspec.Struct, frozen=True):
    """A file that no one of this server needs, and that a server of this state directory made."""

    kind: str
    """"bitmap", "partial", "scratch" or "snapshot"."""
    path: str
    size: int
    """Bytes that it takes up."""
    reason: str
    """Why it is one, in words."""
    kept: bool = False
    """Somebody may want it still: it is removed only if it is named, or if all is to go."""


class StateService(Protocol):
    """Leftovers."""

    async def leftovers(self) -> Sequence[LeftoverInfo]:
        """Every leftover."""

    async def clean(self, paths: Sequence[str] | None, *, everything: bool = False) -> Sequence[LeftoverInfo]:
        """Remove the leftovers at `paths`; None: those that are not kept, or `everything`; what is gone."""
