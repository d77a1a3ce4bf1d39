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


def rescale(bits: bitarray, unit: int, new_unit: int) -> bitarray:
    """`bits`, of which each stands for `unit` bytes, as bits that stand for `new_unit`: set if any of it was.

    Both units are powers of two. There may be clear bits more than needed, at the end.
    """
    while new_unit >= 8 * unit:
        coarser = bitarray()
        for first in range(0, len(bits), _PIECE_BITS):
            # A bit for each byte: whether it has one.
            coarser.pack(bits[first : first + _PIECE_BITS].tobytes())
        bits, unit = coarser, 8 * unit
    while new_unit > unit:
        bits = _whole_bytes(bits)
        bits, unit = bits[::2] | bits[1::2], 2 * unit
    while unit >= 8 * new_unit:
        bits, unit = _from_bytes(bits.unpack(b"\x00", b"\xff")), unit // 8
    while unit > new_unit:
        finer = bitarray(2 * len(bits))
        finer[::2] = finer[1::2] = bits
        bits, unit = finer, unit // 2
    return bits


def _from_bytes(octets: bytes) -> bitarray:
    bits = bitarray()
    bits.frombytes(octets)
    return bits


def _whole_bytes(bits: bitarray) -> bitarray:
    if len(bits) % 8:
        bits = bits.copy()
        bits.fill()
    return bits
