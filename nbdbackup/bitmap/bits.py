"""Long rows of bits, made without holding anybody up.

A map of a disk of 16 TiB has 2**28 bits, 32 MiB: to fill it, or only to count it, takes longer than a client
should wait, and no other thread runs meanwhile.
"""

import mmap
import threading
import time
from collections.abc import Iterator

from bitarray import bitarray

_PIECE_BITS = 1 << 22
_REST_S = 50e-6


def pieces(count: int) -> Iterator[tuple[int, int]]:
    """First bit, and the one behind the last, of each piece of `count` bits: less than a millisecond's work.

    In a thread other than the main one there is a rest after each: who waits to run does.
    """
    rests = threading.current_thread() is not threading.main_thread()
    for first in range(0, count, _PIECE_BITS):
        if rests and first:
            # The event loop would otherwise wait some milliseconds for each of its system calls.
            time.sleep(_REST_S)
        yield first, min(first + _PIECE_BITS, count)


def clear_plane(count: int) -> bitarray:
    """`count` clear bits, rounded up to whole bytes, that take memory only as they are set."""
    if not count:
        return bitarray()
    # Pages that nobody has written to are no memory, and need no clearing.
    return bitarray(buffer=mmap.mmap(-1, -(-count // 8)))


def set_plane(count: int) -> bitarray:
    """`count` set bits, rounded up to whole bytes; those past `count` are clear."""
    bits = clear_plane(count)
    for first, stop in pieces(count):
        bits[first:stop] = 1
    return bits


def count_set(bits: bitarray) -> int:
    """How many of `bits` are set."""
    return sum(bits.count(1, first, stop) for first, stop in pieces(len(bits)))


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
