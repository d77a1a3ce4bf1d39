"""NBD URIs: where a server is, and which of its exports is meant.

    nbd://HOST[:PORT]/EXPORT            nbd+unix:///EXPORT?socket=PATH
    nbds://HOST[:PORT]/EXPORT           nbds+unix:///EXPORT?socket=PATH      the same, with TLS

With TLS, `tls-certificates=DIR`, `tls-hostname=NAME`, `tls-verify-peer=BOOL` and `tls-psk-file=FILE` with
`USER@` before the host; libnbd's names and meanings.

The export name is the path without its first slash, percent-decoded; no path is the default
export "". A query parameter that is not known is refused: one that asked for TLS and was silently
dropped would send the disk in the clear.

Source: the NBD project's doc/uri.md.
"""

from urllib.parse import quote, unquote_to_bytes, urlsplit

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.nbd.constants import PORT_DEFAULT, STRING_BYTES_MAX
from nbdbackup.nbd.replies import shown_text

SCHEMES = ("nbd", "nbd+unix", "nbds", "nbds+unix")

_PARAMETERS = ("socket", "tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer")
_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")

_SHOWN_MAX = 200
"""Characters of what was given, in an error."""

_SAFE = "/"
"""Kept readable in export names and paths; all else that RFC 3986 does not call unreserved is encoded."""


class NbdUri(msgspec.Struct, frozen=True):
    """An export of a server, on TCP (`host`, `port`) or on a Unix socket (`socket_path`), never both."""

    export: str
    host: str | None = None
    port: int = PORT_DEFAULT
    socket_path: str | None = None
    tls: bool = False
    username: str | None = None
    """For TLS with pre-shared keys."""
    tls_certificates: str | None = None
    tls_psk_file: str | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool = True

    def __str__(self) -> str:
        """The URI, as it was meant."""
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket_path is not None else "")
        parameters = (
            ("socket", self.socket_path),
            ("tls-certificates", self.tls_certificates),
            ("tls-psk-file", self.tls_psk_file),
            ("tls-hostname", self.tls_hostname),
            ("tls-verify-peer", None if self.tls_verify_peer else "0"),
        )
        query = "&".join(
            f"{key}={quote(value, _SAFE, errors='surrogateescape')}"
            for key, value in parameters
            if value is not None
        )
        user = "" if self.username is None else quote(self.username, "") + "@"
        place = user if self.socket_path is not None else f"{user}{_bracketed(self.host or '')}:{self.port}"
        # A socket's URI has an empty host, which only the slash after it makes visible.
        path = "/" + quote(self.export, _SAFE) if self.export or self.socket_path is not None else ""
        return f"{scheme}://{place}{path}" + (f"?{query}" if query else "")


def format_tcp(host: str, port: int, export: str, *, tls: bool = False) -> str:
    """The URI of `export` at `host` (a name, an IPv4 or a bare IPv6 address); "" is the default export."""
    return str(NbdUri(export=export, host=host, port=port, tls=tls))


def format_unix(path: str, export: str, *, tls: bool = False) -> str:
    """The URI of `export` on the Unix socket `path`; "" is the default export."""
    return str(NbdUri(export=export, socket_path=path, tls=tls))


def is_uri(text: str) -> bool:
    """Whether `text` begins with an NBD scheme; a path never does, unless it is written `./nbd:...`."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def parse(text: str) -> NbdUri:
    """Read an NBD URI.

    Raises:
        UsageError: it is not one, or says something contradictory or not known.
    """
    if any(character <= " " or character == "\x7f" for character in text):
        raise _refused(text, "it has a space or control character; write it percent-encoded")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        # It may repeat as much of the text as there is, and as it is.
        raise _refused(text, shown_text(str(error))[:_SHOWN_MAX]) from None
    if not is_uri(text):
        raise _refused(text, f"the scheme must be one of {', '.join(SCHEMES)}")
    if parts.fragment or text.endswith("#"):
        raise _refused(text, "it has a fragment; write # in an export name as %23")
    if parts.password is not None:
        raise _refused(text, "a password has no place in it")
    if port == 0:
        raise _refused(text, "port 0 cannot be connected to")
    tls = parts.scheme.startswith("nbds")
    parameters = _parameters(text, parts.query)
    socket_path = parameters.pop("socket", None)
    if parameters and not tls:
        raise _refused(text, f"{next(iter(parameters))} needs nbds:// or nbds+unix://")
    if "tls-certificates" in parameters and "tls-psk-file" in parameters:
        raise _refused(text, "tls-certificates and tls-psk-file contradict each other")
    host = None if parts.hostname is None else _decoded(text, parts.hostname)
    if parts.scheme.endswith("+unix"):
        if not socket_path:
            raise _refused(text, "nbd+unix needs ?socket=PATH")
        if host or port is not None:
            raise _refused(
                text, "a Unix socket has no host; write three slashes, nbd+unix:///EXPORT?socket=PATH"
            )
    elif socket_path is not None:
        raise _refused(text, "socket= needs nbd+unix:// or nbds+unix://")
    return NbdUri(
        export=_export_name(text, parts.path),
        host=(host or "localhost") if socket_path is None else None,
        port=PORT_DEFAULT if port is None else port,
        socket_path=socket_path,
        tls=tls,
        username=None if parts.username is None else _decoded(text, parts.username),
        tls_certificates=parameters.get("tls-certificates"),
        tls_psk_file=parameters.get("tls-psk-file"),
        tls_hostname=_text_of(text, parameters.get("tls-hostname")),
        tls_verify_peer=_truth_of(text, parameters.get("tls-verify-peer", "1")),
    )


def _parameters(text: str, query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        key, separator, value = pair.partition("=")
        if key not in _PARAMETERS:
            raise _refused(text, f"query parameter {key[:_SHOWN_MAX]!r} is not known")
        if key in parameters:
            raise _refused(text, f"{key} is given twice")
        if not separator or not value:
            raise _refused(text, f"{key} has no value")
        # Most parameters are paths, and a path need not be UTF-8.
        parameters[key] = _decoded(text, value, "surrogateescape")
    return parameters


def _text_of(text: str, value: str | None) -> str | None:
    if value is not None and not value.isprintable():
        raise _refused(text, "tls-hostname is not UTF-8")
    return value


def _truth_of(text: str, value: str) -> bool:
    lowered = value.lower()
    if lowered not in _TRUE + _FALSE:
        raise _refused(text, f"tls-verify-peer is {_TRUE[0]} or {_FALSE[0]}, not {value[:_SHOWN_MAX]!r}")
    return lowered in _TRUE


def _export_name(text: str, path: str) -> str:
    name = _decoded(text, path.removeprefix("/"))
    if len(name.encode()) > STRING_BYTES_MAX:
        raise _refused(text, f"the export name is longer than {STRING_BYTES_MAX} bytes")
    return name


def _decoded(text: str, encoded: str, errors: str = "strict") -> str:
    # Not unquote_plus: a plus sign in an NBD URI is a plus sign.
    try:
        decoded = unquote_to_bytes(encoded).decode("utf-8", errors)
    except UnicodeError:
        raise _refused(text, "its percent-encoding is not UTF-8") from None
    if "\0" in decoded:
        raise _refused(text, "it has a NUL in it")
    return decoded


def _bracketed(host: str) -> str:
    return f"[{quote(host, ':')}]" if ":" in host else quote(host, "")


def _refused(text: str, reason: str) -> UsageError:
    shown = text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "..."
    return UsageError(f"{shown!r} is not a usable NBD URI: {reason}")
