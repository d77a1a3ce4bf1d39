"""What is not compared, and why: the one list of it.

A mask names members of JSON objects; they are left out wherever they stand in what is compared.

Always left out: members called x-nbdbackup-..., which are our own. Of the `error` of a job only the end is
compared, the system's words: QEMU says no more than these, we say before them what failed and where.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nbdbackup.job.events import Json


@dataclass(frozen=True, slots=True)
class Mask:
    """Members called one of `members` are not compared, for the reason `why`."""

    members: frozenset[str]
    why: str


def _mask(*members: str, why: str) -> Mask:
    return Mask(frozenset(members), why)


PROGRESS = _mask(
    "offset", "current-progress", why="how far a job is that is held in the middle, or was stopped there"
)
LENGTH = _mask(
    "len", "total-progress", why="of a disk whose size is no multiple of 512, which QEMU rounds up to one"
)
BUSY = _mask("busy", why="whether the job is at work at this very moment")


def without(value: Json, masks: Sequence[Mask]) -> Json:
    """`value` less what the masks name."""
    members = frozenset[str]().union(*(mask.members for mask in masks))
    if isinstance(value, dict):
        return {
            name: _cause(member) if name == "error" else without(member, masks)
            for name, member in value.items()
            if name not in members and not name.startswith("x-nbdbackup-")
        }
    if isinstance(value, list):
        return [without(item, masks) for item in value]
    return value


def _cause(error: Json) -> str:
    return re.split(r"[:,] ", str(error))[-1]
