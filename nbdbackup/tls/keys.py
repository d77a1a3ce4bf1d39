"""Pre-shared keys: `NAME:HEX` lines, as `psktool` writes them and QEMU, libnbd and nbdkit read them."""

from pathlib import Path
from typing import Self

from nbdbackup.errors import UsageError

KEY_BYTES_MIN = 16
FILE_BYTES_MAX = 1 << 20


class Keys(dict[str, bytes]):
    """The key of each name."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`; empty lines and those that begin with # do not count.

        Raises:
            UsageError: it cannot be read, or a line is no name with a key of at least 128 bits.
        """
        try:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise UsageError(f"cannot read the keys in {path}: {error.strerror}") from None
        if len(data) > FILE_BYTES_MAX:
            raise UsageError(f"{path} is no file of keys: it is longer than 1 MiB")
        keys = cls()
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip() and not line.startswith(b"#"):
                keys._add(line.strip(), f"{path}, line {number}")
        if not keys:
            raise UsageError(f"{path} has no keys in it; a line is NAME:HEX, and psktool makes them")
        return keys

    def _add(self, line: bytes, where: str) -> None:
        # What the line says is secret, and not repeated.
        name_bytes, _, digits = line.rpartition(b":")
        try:
            name = name_bytes.decode()
            key = bytes.fromhex(digits.decode("ascii"))
        except ValueError:
            raise UsageError(f"{where}: not NAME:HEX") from None
        if not name:
            raise UsageError(f"{where}: not NAME:HEX")
        if len(key) < KEY_BYTES_MIN:
            raise UsageError(f"{where}: a key has at least {KEY_BYTES_MIN} bytes, {2 * KEY_BYTES_MIN} digits")
        if name in self:
            raise UsageError(f"{where}: {name!r} has a key already")
        self[name] = key
