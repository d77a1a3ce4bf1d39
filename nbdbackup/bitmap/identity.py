"""Which disk a stored bitmap speaks of, and whether it is still that disk, unchanged.

A bitmap that the server loads says "nothing but these granules was written". That holds only if the disk
is the same one and nobody wrote to it while no server was recording. What can be seen of that:

    of what          that it is the same    that nobody wrote while the server was away
    local file       inode                  after a clean stop: mtime and ctime are as they were then;
                                            after a crash: the file system is the same one, and mtime no later
                                            than the last sign of life and `SIGN_OF_LIFE_SLACK_S`
    file elsewhere   inode                  after a clean stop as above; after a crash nothing, as its times
    (NFS, FUSE)                             come from another clock
    block device     the kernel's id of it  nothing: a block device keeps no time of writing
                     (wwid, serial, LVM's
                     uuid ...); without
                     one, its number, and
                     that on one boot alone
    remote export    its URI                nothing

and of all of them the size. What cannot be seen is the user's to know: when others wrote to a block device or
a remote export while the server was away, its bitmaps have to be removed, and its next backup is a full one.
Nor is a writer seen who put the clock back, or wrote within the slack after a crash.
"""

from enum import IntEnum

import msgspec

SIGN_OF_LIFE_SLACK_S = 30
"""A file written this long after the last sign of life of a server that crashed may be its own doing."""

_NS_PER_S = 10**9


class SourceKind(IntEnum):
    """What a source is. The numbers are in files."""

    LOCAL_FILE = 1
    SHARED_FILE = 2
    """A file whose times are not of this machine's clock."""
    BLOCK_DEVICE = 3
    REMOTE = 4


class SourceIdentity(msgspec.Struct, frozen=True):
    """What is known of a source of `size` bytes at one moment; 0 and "" where there is no such thing."""

    kind: SourceKind
    size: int
    device: int = 0
    """Of a file the number of its file system, of a block device its own. Holds until the next boot."""
    inode: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    lasting_id: str = ""
    """Of a block device what it keeps over boots, of a remote export its URI."""

    def difference(self, now: "SourceIdentity", same_boot: bool) -> str:
        """Why the source `now` is not this one; "" if it is, as far as can be seen."""
        if now.kind is not self.kind and not {now.kind, self.kind} <= _FILES:
            return f"the disk was {_NAMES[self.kind]}, and is {_NAMES[now.kind]} now"
        if now.lasting_id != self.lasting_id:
            return (
                f"the disk is another one ({now.lasting_id or 'without id'}, not {self.lasting_id or 'that'})"
            )
        if self.kind in _FILES and now.inode != self.inode:
            return "the disk is another file"
        if self.kind is SourceKind.BLOCK_DEVICE:
            if same_boot and now.device != self.device:
                return "the disk is another block device"
            if not same_boot and not self.lasting_id:
                return "the disk is a block device without an id to know it by after a restart of the machine"
        if now.size != self.size:
            return f"the disk was {self.size} bytes long, and is {now.size} now"
        return ""

    def change_since_stop(self, now: "SourceIdentity") -> str:
        """Why others changed it since the clean stop that this identity is of; "" if nothing is seen."""
        if (now.mtime_ns, now.ctime_ns) != (self.mtime_ns, self.ctime_ns):
            return "the disk was changed while no server recorded it"
        return ""

    def change_since_crash(self, now: "SourceIdentity", alive_ns: int) -> str:
        """Why others changed it since a crash on this boot; "" if nothing is seen.

        `alive_ns` is the server's last sign of life, in nanoseconds since 1970.
        """
        if SourceKind.LOCAL_FILE not in (self.kind, now.kind):
            return ""
        if now.device != self.device:
            return "the disk is another file"
        if was_changed_after(now.mtime_ns, alive_ns):
            return "the disk was changed after the server that recorded it had died"
        return ""


def was_changed_after(mtime_ns: int, alive_ns: int) -> bool:
    """Whether a local file was written to so long after the last sign of life that others did it."""
    return mtime_ns > alive_ns + SIGN_OF_LIFE_SLACK_S * _NS_PER_S


_FILES = frozenset({SourceKind.LOCAL_FILE, SourceKind.SHARED_FILE})
_NAMES = {
    SourceKind.LOCAL_FILE: "a file",
    SourceKind.SHARED_FILE: "a file",
    SourceKind.BLOCK_DEVICE: "a block device",
    SourceKind.REMOTE: "a remote export",
}
