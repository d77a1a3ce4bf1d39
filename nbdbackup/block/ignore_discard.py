"""A device that keeps what clients would discard: `discard` of a node, when it is "ignore"."""

from msgspec.structs import replace

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.filter import FilterDevice


class IgnoreDiscard(FilterDevice):
    """Forwards everything but trims; zeroed ranges stay allocated."""

    def __init__(self, child: BlockDevice) -> None:
        super().__init__(child)
        self.features = replace(child.features, trim=False)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        del may_unmap
        await self.child.write_zeroes(offset, length, False, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """Nothing: that is what it is for."""
