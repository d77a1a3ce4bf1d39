"""Who the other side has proved to be, and lists of who may come in.

With certificates that is a distinguished name, with pre-shared keys the name that a key is filed under.

A name is written as RFC 4514 has it, `CN=backup.example.com,O=Example,C=GB`; a comma or another special
character in a value is written `\\,` or as its hexadecimal bytes, `\\2C`. Tools disagree on which end
comes first, so a name is the same either way round. Values are compared exactly.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from nbdbackup.errors import UsageError

FILE_BYTES_MAX = 1 << 20

_SHORT = {
    "CN": "commonName",
    "O": "organizationName",
    "OU": "organizationalUnitName",
    "C": "countryName",
    "L": "localityName",
    "ST": "stateOrProvinceName",
    "S": "stateOrProvinceName",
    "STREET": "streetAddress",
    "DC": "domainComponent",
    "UID": "userId",
    "EMAIL": "emailAddress",
    "E": "emailAddress",
    "SN": "surname",
    "GN": "givenName",
}
_LONG: dict[str, str] = {}
for _short, _name in _SHORT.items():
    _LONG.setdefault(_name, _short)

_SPECIAL = ',+"\\<>;='
_TOKEN = re.compile(r"\\[0-9A-Fa-f]{2}|\\.|[^\\]", re.DOTALL)


class DistinguishedName(msgspec.Struct, frozen=True):
    """A certificate's subject: its parts in order, each a set of (type, value), mostly of one."""

    parts: tuple[frozenset[tuple[str, str]], ...]

    def is_same(self, other: "DistinguishedName") -> bool:
        """Whether both mean the same, whichever end comes first."""
        return other.parts in (self.parts, self.parts[::-1])

    def __str__(self) -> str:
        """As RFC 4514 has it, fit for a log line."""
        return ",".join("+".join(_format(*pair) for pair in sorted(part)) for part in self.parts[::-1])


PeerName: TypeAlias = DistinguishedName | str
"""A certificate's subject, or the name of a pre-shared key."""


def of_certificate(certificate: Mapping[str, object] | None) -> DistinguishedName | None:
    """The subject of what `getpeercert()` returned; None if it has none."""
    subject = certificate.get("subject") if certificate else None
    if not isinstance(subject, tuple) or not subject:
        return None
    return DistinguishedName(tuple(frozenset(part) for part in subject))


def parse(text: str) -> DistinguishedName:
    """The name that `text` is, most specific part first.

    Raises:
        UsageError: it is none.
    """
    parts = [
        frozenset(_pair(pair, text) for pair in _split(part, "+")) for part in _split(_tokens(text), ",;")
    ]
    return DistinguishedName(tuple(reversed(parts)))


def load(path: Path) -> list[DistinguishedName]:
    """The names in `path`, one a line; empty lines and those that begin with # do not count.

    Raises:
        UsageError: it cannot be read, or a line is no name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError(f"cannot read the names in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no list of names: it is not UTF-8") from None
    if len(data) > FILE_BYTES_MAX:
        raise UsageError(f"{path} is no list of names: it is longer than 1 MiB")
    lines = (line.strip() for line in text.splitlines())
    return [parse(line) for line in lines if line and not line.startswith("#")]


def is_authorised(name: PeerName | None, allowed: Iterable[PeerName]) -> bool:
    """Whether `name` is one of `allowed`."""
    return name is not None and any(_is_same(name, other) for other in allowed)


def _is_same(one: PeerName, other: PeerName) -> bool:
    if isinstance(one, DistinguishedName) and isinstance(other, DistinguishedName):
        return one.is_same(other)
    return one == other


def _tokens(text: str) -> list[str]:
    """The characters of `text`, an escaped one with its backslash."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise _refused(text, "it ends in a backslash")
    return tokens


def _split(tokens: Sequence[str], separators: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for token in tokens:
        if token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _pair(tokens: Sequence[str], text: str) -> tuple[str, str]:
    if "=" not in tokens:
        raise _refused(text, "each part is TYPE=VALUE, and a comma in a value is written \\,")
    equals = tokens.index("=")
    kind = "".join(tokens[:equals]).strip()
    raw = list(tokens[equals + 1 :])
    while raw and raw[0].isspace():
        del raw[0]
    while raw and raw[-1].isspace():
        del raw[-1]
    if not kind or not raw:
        raise _refused(text, "each part is TYPE=VALUE, and neither is empty")
    if raw[0] == "#" or '"' in raw:
        raise _refused(text, "values are written as text, without quotes; special characters as \\, or \\2C")
    value = b"".join(_unescaped(token) for token in raw)
    try:
        return _SHORT.get(kind.upper(), kind), value.decode()
    except UnicodeDecodeError:
        raise _refused(text, "its hexadecimal bytes are not UTF-8") from None


def _unescaped(token: str) -> bytes:
    if len(token) == 3:
        return bytes.fromhex(token[1:])
    return token[-1].encode(errors="surrogateescape")


def _format(kind: str, value: str) -> str:
    shown = "".join(
        f"\\{character}"
        if character in _SPECIAL
        else character
        if character.isprintable()
        else "".join(f"\\{byte:02X}" for byte in character.encode(errors="surrogateescape"))
        for character in value
    )
    return f"{_LONG.get(kind, kind)}={shown}"


def _refused(text: str, reason: str) -> UsageError:
    shown = text if len(text) <= 200 else text[:200] + "..."
    return UsageError(f"{shown!r} is no distinguished name: {reason}")
