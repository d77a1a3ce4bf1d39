"""A bitmap's file, byte for byte.

    0      header, slot 0
    4096   header, slot 1
    8192   plane 0     one bit for each granule, the first one the highest bit of byte 0
    ...    plane 1     as long; both begin on a multiple of 4096. A COPY, which never changes, has none

One of the planes is the bitmap's own (flag SECOND_PLANE: plane 1). With the flag BOTH, what is set in the
other one is dirty as well. Without it, what the other plane holds means nothing. With BOTH and a `holder`,
the bitmap is frozen for that one, whatever becomes of the server: the other plane is the successor's.

The header is there twice, and every change is written to one slot and then to the other. So a crash in the
middle leaves one whole, and once both were written, damage to either is no loss. The valid one of the higher
generation counts. The checksum is over the slot without the checksum itself.

A header of another version is not looked into: only the magic and the version keep their places.
"""

import hashlib
from enum import IntFlag

import msgspec
from construct import Bytes, ConstructError, Int32ub, Int64sb, Int64ub, Padded, PascalString, Struct

from nbdbackup.bitmap.identity import SourceIdentity, SourceKind

MAGIC = b"nbdbkbm\x1a"
VERSION = 1
SLOT_BYTES = 4096
PLANES_OFFSET = 2 * SLOT_BYTES
TEXT_BYTES_MAX = 1023
"""As long may the names of node and bitmap be, and the source's id."""
REASON_BYTES_MAX = 500
HOLDER_BYTES = 16
NO_HOLDER = bytes(HOLDER_BYTES)

_GRANULARITIES = {1 << shift for shift in range(9, 32)}
_PAGE_BYTES = 4096
_CHECKSUM_BYTES = 32
_CHECKSUM_END = len(MAGIC) + 4 + _CHECKSUM_BYTES

_TEXT = PascalString(Int32ub, "utf8")
_SLOT = Padded(
    SLOT_BYTES,
    Struct(
        "magic" / Bytes(len(MAGIC)),
        "version" / Int32ub,
        "checksum" / Bytes(_CHECKSUM_BYTES),
        "generation" / Int64ub,
        "flags" / Int32ub,
        "granularity" / Int32ub,
        "size" / Int64ub,
        "uuid" / Bytes(16),
        "boot_id" / Bytes(16),
        "alive_ns" / Int64sb,
        "bits_checksum" / Bytes(_CHECKSUM_BYTES),
        "kind" / Int32ub,
        "device" / Int64ub,
        "inode" / Int64ub,
        "mtime_ns" / Int64sb,
        "ctime_ns" / Int64sb,
        "node" / _TEXT,
        "name" / _TEXT,
        "lasting_id" / _TEXT,
        "inconsistent" / _TEXT,
        "holder" / Bytes(HOLDER_BYTES),
    ),
)


class HeaderFlags(IntFlag):
    """What is so or not."""

    ENABLED = 1
    IN_USE = 2
    """A server records in it, or did until it died."""
    SECOND_PLANE = 4
    """The bitmap's own bits are those of plane 1."""
    BOTH = 8
    """What is set in the other plane is dirty too."""
    POWER = 16
    """Every bit was on disk before the write that it stands for was begun."""
    REMOVED = 32
    """Its removal has begun: it records no more, and the file goes when the directory is opened."""
    COPY = 64
    """It is no bitmap, but what one was at the instant of the holder, a snapshot."""


_ALL_FLAGS = sum(HeaderFlags)


class Header(msgspec.Struct, frozen=True):
    """What is known of a bitmap besides its bits."""

    uuid: bytes
    node: str
    name: str
    granularity: int
    identity: SourceIdentity
    """Of the source; its times are those of the clean stop, and mean nothing with IN_USE."""
    flags: HeaderFlags
    generation: int = 0
    boot_id: bytes = bytes(16)
    """The boot on which it was last in use."""
    alive_ns: int = 0
    """When the server that uses it was last seen alive, in nanoseconds since 1970."""
    bits_checksum: bytes = bytes(_CHECKSUM_BYTES)
    """Of every plane that counts, at the clean stop; means nothing with IN_USE."""
    inconsistent: str = ""
    """Why the bits are of no use, "" if they are."""
    holder: bytes = NO_HOLDER
    """The uuid of what froze it and outlives the server; NO_HOLDER: there is no such thing."""

    @property
    def own_plane(self) -> int:
        """0 or 1."""
        return 1 if HeaderFlags.SECOND_PLANE in self.flags else 0

    @property
    def is_held(self) -> bool:
        """Whether it is frozen for a holder."""
        return HeaderFlags.BOTH in self.flags and self.holder != NO_HOLDER

    @property
    def bits_bytes(self) -> int:
        """As many bytes of a plane hold bits."""
        return -(-self.identity.size // (8 * self.granularity))

    @property
    def file_bytes(self) -> int:
        """How long the whole file is."""
        return self.plane_offset(1 if HeaderFlags.COPY in self.flags else 2)

    def plane_offset(self, plane: int) -> int:
        """Where in the file plane 0 or 1 begins."""
        return PLANES_OFFSET + plane * -(-self.bits_bytes // _PAGE_BYTES) * _PAGE_BYTES


class HeaderError(Exception):
    """A slot that is no header of this version; the text says why."""


def checksum(*parts: bytes | memoryview) -> bytes:
    """The checksum of `parts`, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def build(header: Header) -> bytes:
    """The bytes of a slot."""
    identity = header.identity
    fields = {
        "magic": MAGIC,
        "version": VERSION,
        "checksum": bytes(_CHECKSUM_BYTES),
        "generation": header.generation,
        "flags": int(header.flags),
        "granularity": header.granularity,
        "size": identity.size,
        "uuid": header.uuid,
        "boot_id": header.boot_id,
        "alive_ns": header.alive_ns,
        "bits_checksum": header.bits_checksum,
        "kind": int(identity.kind),
        "device": identity.device,
        "inode": identity.inode,
        "mtime_ns": identity.mtime_ns,
        "ctime_ns": identity.ctime_ns,
        "node": header.node,
        "name": header.name,
        "lasting_id": identity.lasting_id,
        "inconsistent": cut(header.inconsistent, REASON_BYTES_MAX),
        "holder": header.holder,
    }
    slot: bytes = _SLOT.build(fields)
    head, body = slot[: _CHECKSUM_END - _CHECKSUM_BYTES], slot[_CHECKSUM_END:]
    return head + checksum(head, body) + body


def parse(slot: bytes) -> Header:
    """The header in the bytes of a slot.

    Raises:
        HeaderError: it is damaged, of another version, or something else.
    """
    head, body = slot[: _CHECKSUM_END - _CHECKSUM_BYTES], slot[_CHECKSUM_END:]
    if head[: len(MAGIC)] != MAGIC:
        raise HeaderError("it is no bitmap file of nbdbackup, or its header is damaged")
    version = int.from_bytes(head[len(MAGIC) :], "big")
    if version != VERSION:
        raise HeaderError(f"it is of version {version}, and this nbdbackup knows version {VERSION} alone")
    if slot[_CHECKSUM_END - _CHECKSUM_BYTES : _CHECKSUM_END] != checksum(head, body):
        raise HeaderError("its header is damaged")
    try:
        fields = _SLOT.parse(slot)
        kind = SourceKind(fields.kind)
    except (ConstructError, ValueError, ArithmeticError) as error:
        raise HeaderError(f"its header makes no sense ({error})") from error
    if not fields.size or fields.granularity not in _GRANULARITIES:
        raise HeaderError(f"its header makes no sense (size {fields.size}, granularity {fields.granularity})")
    if fields.flags & ~_ALL_FLAGS:
        raise HeaderError(f"its header has flags that this nbdbackup does not know ({fields.flags:#x})")
    identity = SourceIdentity(
        kind,
        fields.size,
        fields.device,
        fields.inode,
        fields.mtime_ns,
        fields.ctime_ns,
        fields.lasting_id,
    )
    return Header(
        fields.uuid,
        fields.node,
        fields.name,
        fields.granularity,
        identity,
        HeaderFlags(fields.flags),
        fields.generation,
        fields.boot_id,
        fields.alive_ns,
        fields.bits_checksum,
        fields.inconsistent,
        fields.holder,
    )


def cut(text: str, bytes_max: int) -> str:
    """As much of `text` as fits into `bytes_max` bytes of UTF-8."""
    return text.encode()[:bytes_max].decode(errors="ignore")
