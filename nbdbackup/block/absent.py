"""A device that is known, and cannot be reached for now: every operation says so."""

import errno
from typing import NoReturn

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.errors import UnreachableError


class AbsentDevice(BlockDevice):
    """Stands for the device called `name`, of `size` bytes, until there is a connection to it."""

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self._name = name

    def __str__(self) -> str:
        return self._name

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        self._fail()

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self._fail()

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        self._fail()

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        self._fail()

    async def flush(self) -> None:
        self._fail()

    def _fail(self) -> NoReturn:
        raise UnreachableError(errno.EIO, f"{self}: there is no connection to the server")
