"""What the commands about dirty bitmaps ask for, and what they are told."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from nbdbackup.monitor.steps import Step


class BitmapAdd(msgspec.Struct, frozen=True):
    """A new bitmap of `node`; `granularity` in bytes (None: as the node likes)."""

    node: str
    name: str
    granularity: int | None = None
    persistent: bool = False
    enabled: bool = True


class BitmapRemove(msgspec.Struct, frozen=True):
    """Remove the bitmap, and what is stored of it."""

    node: str
    name: str


class BitmapClear(msgspec.Struct, frozen=True):
    """Nothing is dirty in the bitmap any more."""

    node: str
    name: str


class BitmapEnable(msgspec.Struct, frozen=True):
    """Let the bitmap record clients' writes, or (`enabled` False) no longer."""

    node: str
    name: str
    enabled: bool = True


class BitmapMerge(msgspec.Struct, frozen=True):
    """What is dirty in one of `sources`, pairs of node and name, is dirty in the bitmap `target` too."""

    node: str
    target: str
    sources: Sequence[tuple[str, str]]


BitmapChange = BitmapAdd | BitmapRemove | BitmapClear | BitmapEnable | BitmapMerge


class BitmapInfo(msgspec.Struct, frozen=True):
    """A bitmap as it stands. Sizes are bytes."""

    name: str | None
    """None: the successor of a bitmap that is frozen."""
    granularity: int
    count: int
    """Dirty, in whole granules."""
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: str = ""
    """Why it is of no use; "": it is."""


class BitmapService(Protocol):
    """Dirty bitmaps."""

    def action(self, change: BitmapChange) -> Step:
        """The step of a transaction that makes `change`."""
