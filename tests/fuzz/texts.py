"""Text that people and control programs send: `nbd/uri.py` and `monitor/framing.py`."""

import json

from nbdbackup.errors import UsageError
from nbdbackup.monitor.framing import MESSAGE_BYTES_MAX, NESTING_MAX, TOKENS_MAX, JsonStream, JsonStreamError
from nbdbackup.nbd.uri import NbdUri, is_uri, parse
from tests.fuzz.decoder import Cut, FuzzInput, in_pieces, is_one_line, is_time_to_measure, kept_bytes, whole

FRAMING_KEPT_BYTES_MAX = MESSAGE_BYTES_MAX + TOKENS_MAX * 16
"""A value's bytes, and its tokens."""
ERROR_CHARACTERS_MAX = 3000
"""Two parts of a URI, each character at worst as an escape of ten."""

_LONG_BYTES_MAX = 4097
"""Of what is repeated: every byte may be an error of its own."""
_URI_BEGINNINGS = (b"nbd://", b"nbds://", b"nbd+unix:///", b"nbds+unix:///x?socket=/s", b"NBD://h/", b"")
_URI_WORDS = (
    b"nbd", b"nbds", b"+unix", b"://", b"/", b"?", b"&", b"=", b"@", b":", b"[", b"]", b"%", b"#",
    b"socket=/s", b"tls-certificates=/c", b"tls-hostname=h", b"tls-verify-peer=0", b"tls-psk-file=f",
    b"localhost", b"::1", b"10809", b"%2F", b"%00", b"%FF", b"%C3%A9", b"\xc3\xa9", b"\xe2\x84\x80", b"x",
)  # fmt: skip
_JSON_WORDS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"a"', b"'b'", b'"', b"'", b"\\", b"\\u", b"d800", b"0", b"-", b".5",
    b"e9", b"1e999", b"true", b"null", b"x", b" ", b"\n", b"\xff", b"\xc3", b"\xa9", b"\0", b'"execute"',
    b'{"execute":"q"}', b"9" * 20,
)  # fmt: skip


def uri(data: bytes) -> str:
    """An NBD URI: refused in one line, or understood, and then written and understood again the same."""
    source = FuzzInput(data)
    text = (source.choose(_URI_BEGINNINGS) + _words(source, _URI_WORDS)).decode("utf-8", "surrogateescape")
    found = _parse(text)
    if isinstance(found, UsageError):
        assert is_one_line(found), repr(found)
        assert len(str(found)) <= ERROR_CHARACTERS_MAX
        return "refused"
    assert is_uri(text)
    assert (found.host is None) != (found.socket_path is None)
    assert parse(str(found)) == found
    return "understood"


def _parse(text: str) -> NbdUri | UsageError:
    try:
        return parse(text)
    except UsageError as error:
        return error


def framing(data: bytes) -> str:
    """A control client's stream of JSON."""
    source = FuzzInput(data)
    stream = _words(source, _JSON_WORDS)
    outcomes = [_feed(stream, cut) for cut in (whole, in_pieces)]
    assert outcomes[0] == outcomes[1]
    if not outcomes[0]:
        return "waiting"
    return "values" if any(isinstance(one, str) for one in outcomes[0]) else "errors"


def _words(source: FuzzInput, words: tuple[bytes, ...]) -> bytes:
    text = bytearray()
    while source.has_more:
        kind = source.below(256)
        if kind < 200:
            text += words[kind % len(words)]
        elif kind < 240:
            text += source.take(1)
        elif kind < 250:
            text += source.some_bytes()[:_LONG_BYTES_MAX]
        else:
            text += source.choose(words) * source.choose((NESTING_MAX, NESTING_MAX + 1, 3))
    return bytes(text)


def _feed(stream: bytes, cut: Cut) -> list[str | tuple[str, bool]]:
    """Values as JSON, errors as their text and whether they are fatal, in order."""
    parser = JsonStream()
    outcomes: list[str | tuple[str, bool]] = []
    for number, piece in enumerate(cut(stream)):
        for found in parser.feed(piece):
            if isinstance(found, JsonStreamError):
                outcomes.append((str(found), found.fatal))
            else:
                written = json.dumps(found, ensure_ascii=False, allow_nan=False)
                written.encode()
                outcomes.append(written)
        assert not is_time_to_measure(number) or kept_bytes(parser) <= FRAMING_KEPT_BYTES_MAX
        if outcomes and isinstance(outcomes[-1], tuple) and outcomes[-1][1]:
            break
    return outcomes
