"""Sizes and rates as people write them: `512`, `64K`, `1M`, `2G`, powers of 1024.

The same notation as qemu-img's, without its fractions: every size has one exact meaning.
"""

import re

from nbdbackup.errors import UsageError

UNITS = "KMGTPE"
SIZE_BYTES_MAX = 2**63 - 1
_SIZE = re.compile(r"([0-9]{1,20})(?:([KMGTPE])(?:i?B)?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes that `text` stands for: `65536`, `64K`, `64KiB` and `64k` are the same.

    Raises:
        UsageError: it is not a size, or it does not fit in 63 bits.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a size; write bytes, or a whole number with K, M, G or T: 64K, 2G")
    unit = (match[2] or "").upper()
    size = int(match[1]) << (10 * (UNITS.index(unit) + 1) if unit else 0)
    if size > SIZE_BYTES_MAX:
        raise UsageError(f"'{text}' is too large a size; the limit is 8 EiB - 1")
    return size


def format_size(size: int) -> str:
    """`size` in bytes for a person: exact where that is short (`64K`), else one decimal (`1.5G`)."""
    shift = 0
    while shift < len(UNITS) and size >= 1024 ** (shift + 1):
        shift += 1
    if not shift:
        return str(size)
    unit = 1024**shift
    number = f"{size // unit}" if size % unit == 0 else f"{size / unit:.1f}"
    return f"{number}{UNITS[shift - 1]}"
