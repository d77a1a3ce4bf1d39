"""Disk images for tests, and sums to compare them by."""

import hashlib
import os
import random
from pathlib import Path

MIB = 1024 * 1024


def make_disk(path: Path, size: int, seed: int = 1) -> Path:
    """A file of `size` bytes of random data; the same for the same seed."""
    generator = random.Random(seed)
    with path.open("wb") as disk:
        left = size
        while left:
            block = generator.randbytes(min(left, MIB))
            disk.write(block)
            left -= len(block)
    return path


def make_sparse(path: Path, size: int) -> Path:
    """A file of `size` bytes that is one hole."""
    with path.open("wb") as disk:
        disk.truncate(size)
    return path


def sha256(path: Path) -> str:
    """The digest of a file's whole content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated_bytes(path: Path) -> int:
    """How much of the disk below the file takes up."""
    return os.stat(path).st_blocks * 512
