"""Long rows of bits, made without holding anybody up.

A map of a disk of 16 TiB has 2**28 bits, 32 MiB: to fill it takes longer than a client should wait.
"""

import mmap

from bitarray import bitarray

_PIECE_BITS = 1 << 22


def clear_plane(count: int) -> bitarray:
    """`count` clear bits, rounded up to whole bytes, that take memory only as they are set."""
    if not count:
        return bitarray()
    # Pages that nobody has written to are no memory, and need no clearing.
    return bitarray(buffer=mmap.mmap(-1, -(-count // 8)))


def set_plane(count: int) -> bitarray:
    """`count` set bits, rounded up to whole bytes; those past `count` are clear.

    Other threads run in between: called in one of its own, it stalls nobody.
    """
    bits = clear_plane(count)
    for first in range(0, count, _PIECE_BITS):
        bits[first : min(first + _PIECE_BITS, count)] = 1
    return bits
