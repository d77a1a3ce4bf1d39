"""From the bytes of a fuzzer to decisions, and what all targets measure.

Decisions are read from the front, so that a fuzzer which appends to an input or changes its end keeps
what the beginning reached. When the bytes are used up every number is 0 and every choice the
first: any input means something.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from mmap import mmap
from typing import TypeVar

T = TypeVar("T")

Cut = Callable[[bytes], Iterable[bytes]]
"""A way to split a stream into the pieces, none empty, that it arrives in."""

_BYTEWISE_MAX = 600
_PIECE_BYTES = (1, 1, 2, 3, 7, 8, 19, 20, 28, 100, 4096, 70_000)
_PIECES_MAX = 300

INTERESTING = (0, 1, 2, 8, 16, 511, 512, 4096, 4097, (1 << 16) - 1, 1 << 16, (1 << 31) - 1, 1 << 31)
_LONG = (255, 4095, 4096, 4097, 65_535, 65_536, 65_537, 262_144, 262_145)


class FuzzInput:
    """Reads decisions from `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def has_more(self) -> bool:
        """Whether there are bytes that nothing was decided with yet."""
        return self._at < len(self._data)

    def take(self, most: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + most]
        self._at += len(taken)
        return taken

    def number(self, bits: int) -> int:
        """An unsigned number of so many bits, a multiple of 8."""
        return int.from_bytes(self.take(bits // 8).ljust(bits // 8, b"\0"), "big")

    def below(self, limit: int) -> int:
        """A number of `range(limit)`; `limit` is 256 at most."""
        return self.number(8) % limit

    def flag(self) -> bool:
        """Yes or no."""
        return bool(self.below(2))

    def choose(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]

    def number_like(self, likely: Sequence[int], bits: int) -> int:
        """One of `likely`, one of those where programs err, or any other number of so many bits."""
        kind = self.below(8)
        if kind < 5:
            chosen = self.choose(likely)
        elif kind == 5:
            chosen = self.choose(INTERESTING)
        elif kind == 6:
            chosen = (1 << bits) - 1 - self.below(256)
        else:
            chosen = self.number(bits)
        return chosen & ((1 << bits) - 1)

    def some_bytes(self) -> bytes:
        """A few bytes as they are, or one of them many times."""
        length = self.number(8)
        if length < 240:
            return self.take(length)
        return self.take(1).ljust(1, b"a") * self.choose(_LONG)


def whole(stream: bytes) -> Iterable[bytes]:
    """All at once."""
    return (stream,) if stream else ()


def in_pieces(stream: bytes) -> Iterable[bytes]:
    """A byte at a time, or pieces of any size where that would take too long; the same ones each time."""
    if len(stream) <= _BYTEWISE_MAX:
        return [stream[at : at + 1] for at in range(len(stream))]
    cuts = random.Random(zlib.crc32(stream))
    pieces: list[bytes] = []
    at = 0
    while at < len(stream) and len(pieces) < _PIECES_MAX:
        pieces.append(stream[at : at + cuts.choice(_PIECE_BYTES)])
        at += len(pieces[-1])
    return [*pieces, stream[at:]] if at < len(stream) else pieces


def is_one_line(error: Exception) -> bool:
    """Whether the text of `error` can be shown to a person as it is, on any terminal."""
    return str(error).isprintable()


def is_time_to_measure(number: int) -> bool:
    """Whether to look at the memory after piece `number` of a stream; each time would be slow."""
    return number % 16 == 0


def kept_bytes(thing: object, leaving_out: Iterable[object] = ()) -> int:
    """About how much memory `thing` keeps: all that its attributes lead to, each object once."""
    seen = {id(other.obj if isinstance(other, memoryview) else other) for other in leaving_out}
    total, to_see = 0, [thing]
    while to_see:
        one = to_see.pop()
        if id(one) in seen or isinstance(one, type | Enum) or callable(one):
            continue
        seen.add(id(one))
        if isinstance(one, memoryview):
            to_see.append(one.obj)  # what it keeps, which others may look at as well
        elif isinstance(one, bytes | bytearray | mmap):
            total += len(one)
        elif isinstance(one, str):
            total += len(one.encode("utf-8", "surrogatepass"))
        elif isinstance(one, Mapping):
            total += 100 * len(one)
            to_see += [*one.keys(), *one.values()]
        elif isinstance(one, Sequence | set | frozenset):
            total += 8 * len(one)
            to_see += one
        else:
            to_see += _attributes(one)
    return total


def _attributes(thing: object) -> list[object]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]
