"""What a server has to offer, to whom, and what a client and it have agreed on.

Source: the NBD specification, "Handshake phase" and "TLS support".
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_SIZE_MIN_LARGEST,
    BLOCK_SIZE_PREFERRED_SMALLEST,
    PAYLOAD_BYTES_ADVERTISED,
    STRING_BYTES_MAX,
    TransmissionFlags,
)
from nbdbackup.nbd.replies import display_text


class ExportInfo(msgspec.Struct, frozen=True):
    """What is told about one export. Sizes are in bytes.

    Raises:
        UsageError: a string or a size that no client may be told.
    """

    name: str
    description: str
    size: int
    flags: TransmissionFlags
    """As far as the device goes: SEND_DF is withheld from clients without structured replies."""
    block_size_min: int = 1
    block_size_preferred: int = 4096
    payload_bytes_max: int = PAYLOAD_BYTES_ADVERTISED
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    tls_only: bool = False
    """Not for clients without TLS, who may not even learn its size."""
    wide_contexts: frozenset[str] = frozenset()
    """Those of `contexts` whose status has 64 bits: they are hidden from clients without extended headers."""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("description", self.description)):
            if display_text(text) != text:
                raise UsageError(
                    f"export {what} {text[:40]!r} cannot be sent: "
                    f"it must be UTF-8 without NUL, at most {STRING_BYTES_MAX} bytes"
                )
        minimum, preferred = self.block_size_min, self.block_size_preferred
        if not _is_power_of_two(minimum) or minimum > BLOCK_SIZE_MIN_LARGEST:
            raise UsageError(
                f"export {self.name!r}: a minimum block size of {minimum} bytes "
                "is not a power of two up to 64 KiB"
            )
        if not _is_power_of_two(preferred) or preferred < max(minimum, BLOCK_SIZE_PREFERRED_SMALLEST):
            raise UsageError(
                f"export {self.name!r}: a preferred block size of {preferred} bytes is not a power of two "
                f"of at least {max(minimum, BLOCK_SIZE_PREFERRED_SMALLEST)}"
            )
        if self.payload_bytes_max < preferred:
            raise UsageError(
                f"export {self.name!r}: a maximum payload of {self.payload_bytes_max} bytes "
                "is less than the preferred block size"
            )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class TlsMode(Enum):
    """What becomes of STARTTLS, and of clients without it."""

    OFF = "off"
    """The specification's NOTLS."""
    ON = "on"
    """SELECTIVETLS: a client may choose, but for exports that are `tls_only`."""
    REQUIRE = "require"
    """FORCEDTLS."""


class ExportCatalog(Protocol):
    """What there is to negotiate for; asked anew for every option."""

    def exports(self) -> Sequence[ExportInfo]:
        """Every export that LIST shows, in order."""

    def find(self, name: str) -> ExportInfo | None:
        """The export called `name`; "" is the default export, whatever its own name is."""


class Negotiated(msgspec.Struct, frozen=True):
    """What holds in the transmission phase."""

    export: ExportInfo
    """Its flags are those that the client was told."""
    requested_name: str
    structured_replies: bool
    """A READ is answered in chunks."""
    contexts: tuple[tuple[int, str], ...]
    """(id, name) of each meta context selected for this export."""
    extended_headers: bool = False
    """Requests and replies of 32 bytes; `structured_replies` is then true as well."""
