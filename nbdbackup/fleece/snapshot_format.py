"""A snapshot's sidecar, byte for byte: what has to be known beside its scratch to read it again.

    0       header, slot 0
    8192    header, slot 1
    16384   done     one bit for each cluster, the first one the highest bit of byte 0: it is in scratch
    ...     access   as long: the snapshot still offers it; both begin on a multiple of 4096

The header is there twice, and every change is written to one slot and then to the other, so that a crash in
the middle leaves one whole. The valid one of the higher generation counts. The checksum is over the slot
without the checksum itself. Only the magic and the version keep their places in other versions.
"""

import os
from datetime import UTC, datetime, timedelta
from enum import IntFlag

import msgspec
from construct import (
    Bytes,
    ConstructError,
    Float64b,
    GreedyBytes,
    Int32ub,
    Int64sb,
    Int64ub,
    Padded,
    PascalString,
    Prefixed,
    Struct,
)

from nbdbackup.bitmap.file_format import TEXT_BYTES_MAX, HeaderError, checksum, cut
from nbdbackup.bitmap.identity import SourceIdentity, SourceKind
from nbdbackup.errors import UsageError

MAGIC = b"nbdbksn\x1a"
VERSION = 1
SLOT_BYTES = 8192
MAPS_OFFSET = 2 * SLOT_BYTES
PATH_BYTES_MAX = 4095
REASON_BYTES_MAX = 500

_CLUSTERS = {1 << shift for shift in range(9, 32)}
_PAGE_BYTES = 4096
_CHECKSUM_BYTES = 32
_CHECKSUM_END = len(MAGIC) + 4 + _CHECKSUM_BYTES
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_TEXT = PascalString(Int32ub, "utf8")
_SLOT = Padded(
    SLOT_BYTES,
    Struct(
        "magic" / Bytes(len(MAGIC)),
        "version" / Int32ub,
        "checksum" / Bytes(_CHECKSUM_BYTES),
        "generation" / Int64ub,
        "flags" / Int32ub,
        "cluster_bytes" / Int32ub,
        "size" / Int64ub,
        "uuid" / Bytes(16),
        "boot_id" / Bytes(16),
        "created_us" / Int64ub,
        "alive_ns" / Int64sb,
        "maps_checksum" / Bytes(_CHECKSUM_BYTES),
        "kind" / Int32ub,
        "device" / Int64ub,
        "inode" / Int64ub,
        "mtime_ns" / Int64sb,
        "ctime_ns" / Int64sb,
        "scratch_device" / Int64ub,
        "scratch_inode" / Int64ub,
        "scratch_mtime_ns" / Int64sb,
        "scratch_ctime_ns" / Int64sb,
        "scratch_bytes_max" / Int64ub,
        "cbw_timeout_s" / Float64b,
        "node" / _TEXT,
        "name" / _TEXT,
        "lasting_id" / _TEXT,
        "on_cbw_error" / _TEXT,
        "broken" / _TEXT,
        "scratch_path" / Prefixed(Int32ub, GreedyBytes),
    ),
)


class SnapshotFlags(IntFlag):
    """What is so or not."""

    LIVE = 1
    """It was taken and not dropped. Without this it is what an unfinished create or drop left behind."""
    IN_USE = 2
    """A server saves clusters for it, or did until it died."""
    TARGET = 4
    """Clusters are saved straight in a backup's target, which is not scratch to be removed."""


_ALL_FLAGS = sum(SnapshotFlags)


class ScratchIdentity(msgspec.Struct, frozen=True):
    """Which file the saved clusters are in; the times are those of the clean stop."""

    path: str
    device: int = 0
    inode: int = 0
    """0: it may not have been made yet."""
    mtime_ns: int = 0
    ctime_ns: int = 0

    def is_file(self, status: os.stat_result) -> bool:
        """Whether `status` is of that file."""
        return bool(self.inode) and (status.st_dev, status.st_ino) == (self.device, self.inode)


class SnapshotHeader(msgspec.Struct, frozen=True):
    """What is known of a snapshot besides its clusters."""

    uuid: bytes
    node: str
    name: str
    cluster_bytes: int
    identity: SourceIdentity
    """Of the source; its times are those of the clean stop, and mean nothing with IN_USE."""
    scratch: ScratchIdentity
    scratch_bytes_max: int | None
    on_cbw_error: str
    cbw_timeout_s: float
    flags: SnapshotFlags
    created: datetime = _EPOCH
    generation: int = 0
    boot_id: bytes = bytes(16)
    """The boot on which it was last in use."""
    alive_ns: int = 0
    """When the server that uses it was last seen alive, in nanoseconds since 1970."""
    maps_checksum: bytes = bytes(_CHECKSUM_BYTES)
    """At the clean stop; means nothing with IN_USE."""
    broken: str = ""
    """Why it cannot be read any more, "" if it can."""

    @property
    def export_name(self) -> str:
        """`NODE@NAME`."""
        return f"{self.node}@{self.name}"

    @property
    def clusters(self) -> int:
        """How many the source has."""
        return -(-self.identity.size // self.cluster_bytes)

    @property
    def map_bytes(self) -> int:
        """As many bytes of a map hold bits."""
        return -(-self.clusters // 8)

    @property
    def file_bytes(self) -> int:
        """How long the whole sidecar is."""
        return self.map_offset(2)

    def map_offset(self, number: int) -> int:
        """Where in the file map 0, `done`, or 1, `access`, begins."""
        return MAPS_OFFSET + number * -(-self.map_bytes // _PAGE_BYTES) * _PAGE_BYTES


def check_storable(node: str, name: str, path: str) -> None:
    """Raises UsageError if no header can hold these."""
    for what, text in (("node", node), ("snapshot", name)):
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise UsageError(
                f"{what} name {text!r} has characters that cannot be stored: take a --temporary snapshot"
            ) from None
        if length > TEXT_BYTES_MAX:
            raise UsageError(
                f"{what} name {text[:40]}... is too long to be stored: take a --temporary snapshot"
            )
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise UsageError(f"the scratch's path {path[:40]}... is too long: name another place with --scratch")


def build(header: SnapshotHeader) -> bytes:
    """The bytes of a slot."""
    identity, scratch = header.identity, header.scratch
    fields = {
        "magic": MAGIC,
        "version": VERSION,
        "checksum": bytes(_CHECKSUM_BYTES),
        "generation": header.generation,
        "flags": int(header.flags),
        "cluster_bytes": header.cluster_bytes,
        "size": identity.size,
        "uuid": header.uuid,
        "boot_id": header.boot_id,
        "created_us": (header.created - _EPOCH) // _MICROSECOND,
        "alive_ns": header.alive_ns,
        "maps_checksum": header.maps_checksum,
        "kind": int(identity.kind),
        "device": identity.device,
        "inode": identity.inode,
        "mtime_ns": identity.mtime_ns,
        "ctime_ns": identity.ctime_ns,
        "scratch_device": scratch.device,
        "scratch_inode": scratch.inode,
        "scratch_mtime_ns": scratch.mtime_ns,
        "scratch_ctime_ns": scratch.ctime_ns,
        "scratch_bytes_max": header.scratch_bytes_max or 0,
        "cbw_timeout_s": header.cbw_timeout_s,
        "node": header.node,
        "name": header.name,
        "lasting_id": identity.lasting_id,
        "on_cbw_error": header.on_cbw_error,
        "broken": cut(header.broken, REASON_BYTES_MAX),
        "scratch_path": os.fsencode(scratch.path),
    }
    slot: bytes = _SLOT.build(fields)
    head, body = slot[: _CHECKSUM_END - _CHECKSUM_BYTES], slot[_CHECKSUM_END:]
    return head + checksum(head, body) + body


def parse(slot: bytes) -> SnapshotHeader:
    """The header in the bytes of a slot.

    Raises:
        HeaderError: it is damaged, of another version, or something else.
    """
    head, body = slot[: _CHECKSUM_END - _CHECKSUM_BYTES], slot[_CHECKSUM_END:]
    if head[: len(MAGIC)] != MAGIC:
        raise HeaderError("it is no snapshot file of nbdbackup, or its header is damaged")
    version = int.from_bytes(head[len(MAGIC) :], "big")
    if version != VERSION:
        raise HeaderError(f"it is of version {version}, and this nbdbackup knows version {VERSION} alone")
    if slot[_CHECKSUM_END - _CHECKSUM_BYTES : _CHECKSUM_END] != checksum(head, body):
        raise HeaderError("its header is damaged")
    try:
        fields = _SLOT.parse(slot)
        kind = SourceKind(fields.kind)
        created = _EPOCH + fields.created_us * _MICROSECOND
    except (ConstructError, ValueError, ArithmeticError) as error:
        raise HeaderError(f"its header makes no sense ({error})") from error
    if not fields.size or fields.cluster_bytes not in _CLUSTERS or fields.flags & ~_ALL_FLAGS:
        raise HeaderError(
            f"its header makes no sense (size {fields.size}, clusters of {fields.cluster_bytes}, "
            f"flags {fields.flags:#x})"
        )
    return SnapshotHeader(
        fields.uuid,
        fields.node,
        fields.name,
        fields.cluster_bytes,
        SourceIdentity(
            kind,
            fields.size,
            fields.device,
            fields.inode,
            fields.mtime_ns,
            fields.ctime_ns,
            fields.lasting_id,
        ),
        ScratchIdentity(
            os.fsdecode(fields.scratch_path),
            fields.scratch_device,
            fields.scratch_inode,
            fields.scratch_mtime_ns,
            fields.scratch_ctime_ns,
        ),
        fields.scratch_bytes_max or None,
        fields.on_cbw_error,
        fields.cbw_timeout_s,
        SnapshotFlags(fields.flags),
        created,
        fields.generation,
        fields.boot_id,
        fields.alive_ns,
        fields.maps_checksum,
        fields.broken,
    )
