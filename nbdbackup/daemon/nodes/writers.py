"""Who may write to what: the part of QEMU's permissions that keeps points in time whole.

Each use of a node (by an export, by a parent node, by a backup as its target) may *write* and may
refuse to *share* writing with the others. Two things do not share:

- the target of copy-before-write: what was saved there is read back later;
- a node with a copy-before-write filter on it, towards the nodes that it is made of: somebody who writes
  there, past the filter, would change the point in time. Writes to the node itself, under whatever name, are
  seen by the filter, and need not be refused.

Follows QEMU's block permissions in its texts; of its permissions only "write" is known here.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import msgspec

from nbdbackup.block.node import Node
from nbdbackup.daemon.nodes.table import Entry, NodeTable
from nbdbackup.errors import ConflictError
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite
from nbdbackup.job.target import BACKUP_USER

SNAPSHOT_ACCESS = "snapshot-access"


class Use(msgspec.Struct, frozen=True):
    """One use of a node by `who`, in words."""

    who: str
    writes: bool
    shares: bool


def conflicts(table: NodeTable, held: Collection[Node] = ()) -> list[str]:
    """Where somebody writes although another does not share that, a line for each.

    `held` are nodes that are about to get a copy-before-write filter.
    """
    found: list[str] = []
    for entry in table.entries():
        uses = _uses(table, entry, held)
        found += [
            f"Permission conflict on node '{entry.node.name}': permissions 'write' are both "
            f"required by {writer.who} and unshared by {other.who}."
            for writer in uses
            for other in uses
            if writer is not other and writer.writes and not other.shares
        ]
    return found


@contextmanager
def without_new_conflicts(table: NodeTable, held: Collection[Node] = ()) -> Iterator[None]:
    """Let the body change who uses what.

    Raises:
        ConflictError: somebody now writes where another does not share that; the body is to be undone.
    """
    before = conflicts(table)
    yield
    _refuse_new(before, conflicts(table, held))


def check_point_in_time(table: NodeTable, node: Node) -> None:
    """Raise ConflictError if somebody writes to what `node` is made of, past a filter on it."""
    _refuse_new(conflicts(table), conflicts(table, (node,)))


def _refuse_new(before: Collection[str], after: Collection[str]) -> None:
    for line in after:
        if line not in before:
            raise ConflictError(line)


def _uses(table: NodeTable, entry: Entry, held: Collection[Node]) -> list[Use]:
    name = entry.node.name
    uses = [
        Use(
            f"export '{export.name}' (uses node '{name}' as 'root' child)",
            writes=not (export.read_only or entry.node.read_only),
            shares=True,
        )
        for export in table.exports_of(entry)
    ]
    if BACKUP_USER in entry.users:
        uses.append(Use(BACKUP_USER, writes=True, shares=True))
    for parent, child in table.parents(entry):
        who = f"node '{parent.node.name}' (uses node '{name}' as '{child.role}' child)"
        if child.role == "target":
            uses.append(Use(who, writes=True, shares=False))
        elif parent.driver == SNAPSHOT_ACCESS:
            uses.append(Use(who, writes=False, shares=True))
        else:
            above = _uses(table, parent, held)
            uses.append(
                Use(
                    who,
                    writes=any(use.writes for use in above),
                    shares=not _is_held(parent.node, held) and all(use.shares for use in above),
                )
            )
    return uses


def _is_held(node: Node, held: Collection[Node]) -> bool:
    return node in held or any(isinstance(device, CopyBeforeWrite) for device in node.filters)
