"""The contract of everything that can be read and written: `BlockDevice`.

A device is `size` bytes long, for good. Offsets and lengths are bytes and need no
alignment; a range lies inside the device (callers check, devices assert).

What a device promises:

- An operation that returned has happened: a read that starts later sees the write.
  Overlapping operations in flight at the same time have no order.
- `flush` covers every write, write_zeroes and trim that *returned* before it began,
  whoever made it. `fua=True` makes one write durable before it returns.
- A failed operation raises OSError with a Linux errno. After a failed write the range
  holds old or new bytes, or a mix.
- The `_nowait` twins finish at once and return True, or do nothing and return False;
  then the caller takes the async way. They may raise OSError like the others.
- Cancelling an operation never leaves it running behind the caller's back: the await
  ends only when the I/O has ended.
- The caller keeps its buffer alive and unchanged until the operation has returned.

Filters (`block/filter.py`) forward to one child. The server, jobs and filters know
devices by this class alone. `tests/conformance/` has one suite that every device passes.
"""

from abc import ABC, abstractmethod

import msgspec

from nbdbackup.extents import Allocation, ContextExtent, StatusExtent

ReadableBuffer = bytes | bytearray | memoryview
WritableBuffer = bytearray | memoryview


class Features(msgspec.Struct, frozen=True):
    """What a device does more than read and write; set once, when it is opened."""

    trim: bool = False
    """`trim` may give space back. Without it `trim` does nothing, successfully."""
    fast_zero: bool = False
    """`write_zeroes(fast=True)` can succeed."""
    rotational: bool = False
    """Seeks cost; a hint for clients."""


class BlockDevice(ABC):
    """One device; see the module's docstring for what all of them promise.

    Set once: `size` (bytes), `read_only`, `features`. `str(device)` is what a person
    calls it: its path, URI or node name.
    """

    size: int
    read_only: bool = False
    features: Features = Features()

    @abstractmethod
    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill the whole `buffer` with the bytes from `offset` on."""

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        """As `read`, but what is known to be zero may be told instead of filled in.

        Returns extents that cover the whole non-empty `buffer`, neighbours different in flags. Where one
        has ZERO the bytes are zeroes and what `buffer` holds there means nothing; elsewhere it was
        filled. It is one read: in a point in time, bytes and extents are of the same one.
        """
        await self.read(offset, buffer)
        return [StatusExtent(len(buffer), Allocation.DATA)]

    @abstractmethod
    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        """Store all of `data` at `offset`; durable on return if `fua`."""

    @abstractmethod
    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read back as zeroes; keep it allocated unless `may_unmap`.

        Raises:
            OSError: ENOTSUP if `fast` and it would take as long as writing; the range
                is unchanged then. Never ENOTSUP without `fast`.
        """

    @abstractmethod
    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """The bytes are no longer needed: they may read back as anything. A hint."""

    @abstractmethod
    async def flush(self) -> None:
        """Make durable whatever returned before this call, whoever wrote it."""

    async def cache(self, offset: int, length: int) -> None:
        """The range will be read soon. A hint; the default does nothing."""
        del offset, length

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        """What is known of the range, in order, from `offset` on.

        Returns at least one extent for a non-empty range; neighbours differ in flags; the sum of
        the lengths is at least 1 and at most `length` (bytes): a device may answer for less than was asked.
        """
        del offset
        return [StatusExtent(length, Allocation.DATA)]

    async def allocation_depth(self, offset: int, length: int) -> list[ContextExtent]:
        """Which layer of its backing chain each part of the range is allocated in.

        1 is the device itself, 2 and more its backing files, 0 means in none of them. The extents are
        as those of `block_status`. The default is for a device without a backing chain.
        """
        del offset
        return [ContextExtent(length, 1)]

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        """Whether each part of the range is held by the device's top layer: 1, or is not: 0.

        The extents are as those of `block_status`, but neighbours may be equal. This is what sync=top
        copies; the default is what `allocation_depth` says.
        """
        depths = await self.allocation_depth(offset, length)
        return [ContextExtent(extent.length, int(extent.status == 1)) for extent in depths]

    async def close(self) -> None:  # noqa: B027 - most devices hold nothing
        """Give up what is held. No operation may be in flight, and none may follow."""

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        """`read` if it can be done without waiting."""
        del offset, buffer
        return False

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        """`write` without FUA if it can be done without waiting."""
        del offset, data
        return False

    def offload_fd(self) -> int | None:
        """A descriptor whose bytes at each offset are this device's, or None.

        For `copy_file_range` by the block copy, with the same care as a read or write here.
        """
        return None
