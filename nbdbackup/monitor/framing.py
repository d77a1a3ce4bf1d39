"""From bytes to JSON values, with no I/O: what a QMP client sends.

QMP is a stream of JSON values with nothing between them, not even a newline, so the end of a
value has to be found by looking at its tokens. `JsonStream` cuts the stream into tokens, counts
the brackets, and gives each whole value to the `json` module; only when that refuses the value
are the tokens looked at once more, to say what is wrong in the words that QMP users know.

After an error the stream goes on: the rest of a broken token is skipped up to the next
bracket, comma, colon or line end. Only a value beyond `MESSAGE_BYTES_MAX` is final: there is no
telling where it would end.

The tokens are QEMU's: JSON's, and strings in single quotes.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Protocol

import msgspec

from nbdbackup.job.events import Json

MESSAGE_BYTES_MAX = 1 << 20
TOKENS_MAX = 1 << 16
NESTING_MAX = 512
"""Well below what the json module's recursion can take."""

_NEVER = rb"\x00-\x1f\xc0\xc1\xf5-\xff"
"""Bytes that no string holds: control characters, and what UTF-8 has no use for."""
_DOUBLE = rb'"[^"\\%b]*+(?:\\[^%b][^"\\%b]*+)*+' % (_NEVER, _NEVER, _NEVER)
_SINGLE = rb"'[^'\\%b]*+(?:\\[^%b][^'\\%b]*+)*+" % (_NEVER, _NEVER, _NEVER)
_TOKEN = re.compile(
    rb"""
    (?P<space>   [ \t\r\n]+ )
  | (?P<mark>    [\[\]{},:] )
  | (?P<string>  %b" | %b' )
  | (?P<number>  -?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)? (?![0-9.eE]) )
  | (?P<keyword> [a-z]+ )
    """
    % (_DOUBLE, _SINGLE),
    re.VERBOSE,
)
_MAY_GO_ON = re.compile(
    rb"""
    (?:%b|%b) \\?
  | [a-z]+
  | -?(?:0|[1-9][0-9]*)?(?:(?<=[0-9])\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?
    """
    % (_DOUBLE, _SINGLE),
    re.VERBOSE,
)
"""What may still become a token, or a longer one, if it ends where the input ends."""
_UNTIL_RECOVERED = re.compile(rb"[^\x00-\x08\x0a-\x1f\[\]{},:\xc0\xc1\xf5-\xff]*")


class JsonStreamError(Exception):
    """Something in the stream is no JSON; the text is QEMU's. `fatal`: nothing can follow."""

    def __init__(self, text: str, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal


class _Token(msgspec.Struct, frozen=True):
    kind: str
    text: bytes


class JsonStream:
    """Feed bytes; take values and errors, in the order of the stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        """What has not become a token yet."""
        self._tokens: list[_Token] = []
        """The tokens of the value that is not complete yet."""
        self._token_bytes = 0
        self._braces = 0
        self._brackets = 0
        self._recovering = False
        self._resume_at = 0

    def feed(self, data: bytes) -> Iterator[Json | JsonStreamError]:
        """Add `data` and yield whatever is complete now; take all of it before feeding again."""
        self._buffer += data
        for token in self._next_tokens():
            if isinstance(token, JsonStreamError):
                self._forget_value()
                yield token
                continue
            outcome = self._add(token)
            if outcome is not None:
                yield outcome.value
        if len(self._buffer) + self._token_bytes > MESSAGE_BYTES_MAX:
            yield JsonStreamError("JSON token size limit exceeded", fatal=True)

    def _next_tokens(self) -> Iterator[_Token | JsonStreamError]:
        data = bytes(self._buffer)
        position = 0
        while position < len(data):
            if self._recovering:
                skipped = _UNTIL_RECOVERED.match(data, position)
                assert skipped is not None
                position = skipped.end()
                self._recovering = position == len(data)
                continue
            match = _TOKEN.match(data, position)
            end = match.end() if match is not None else position
            may_go_on = _MAY_GO_ON.match(data, position)
            if may_go_on is not None and may_go_on.end() == len(data) and not _is_closed(match):
                break
            if match is None:
                yield self._stray(data, position, may_go_on)
                position = self._resume_at
                continue
            position = end
            if match.lastgroup != "space":
                assert match.lastgroup is not None
                yield _Token(match.lastgroup, match.group())
        del self._buffer[:position]

    def _stray(self, data: bytes, position: int, begun: re.Match[bytes] | None) -> JsonStreamError:
        """The error for a token that cannot be one, up to the byte that spoils it."""
        end = begun.end() if begun is not None else position
        self._recovering = True
        self._resume_at = end + 1
        text = data[position : end + 1].decode("utf-8", "replace")
        return JsonStreamError(f"JSON parse error, stray '{text}'")

    def _add(self, token: _Token) -> "_Value | None":
        """Count a token; the outcome if it completes a value."""
        self._tokens.append(token)
        self._token_bytes += len(token.text)
        self._braces += (token.text == b"{") - (token.text == b"}")
        self._brackets += (token.text == b"[") - (token.text == b"]")
        if self._braces + self._brackets > NESTING_MAX:
            self._forget_value()
            return _Value(JsonStreamError("JSON nesting depth limit exceeded"))
        if len(self._tokens) > TOKENS_MAX:
            self._forget_value()
            return _Value(JsonStreamError("JSON token count limit exceeded"))
        if self._braces >= 0 and self._brackets >= 0 and self._braces + self._brackets > 0:
            return None
        tokens = self._tokens
        self._forget_value()
        return _Value(_parse(tokens))

    def _forget_value(self) -> None:
        self._tokens = []
        self._token_bytes = 0
        self._braces = 0
        self._brackets = 0


class _Value(msgspec.Struct, frozen=True):
    """A complete value, which may well be None."""

    value: Json | JsonStreamError


def _is_closed(match: re.Match[bytes] | None) -> bool:
    """Whether the token is whole whatever follows it."""
    return match is not None and match.lastgroup in ("space", "mark", "string")


class _DuplicateKeyError(ValueError):
    pass


def _parse(tokens: list[_Token]) -> Json | JsonStreamError:
    """The value that the tokens make."""
    try:
        text = b" ".join(_requoted(token) for token in tokens).decode()
        value: Json = json.loads(text, object_pairs_hook=_object, parse_float=_finite)
        if "\\u" in text:
            # The json module lets half a surrogate pair through; nothing could print it.
            json.dumps(value, ensure_ascii=False).encode()
    except _DuplicateKeyError:
        return JsonStreamError("JSON parse error, duplicate key")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        return JsonStreamError(f"JSON parse error, \\u{code:04X} is not a valid Unicode character")
    except UnicodeDecodeError:
        return JsonStreamError("JSON parse error, invalid UTF-8 sequence in string")
    except json.JSONDecodeError:
        return JsonStreamError(f"JSON parse error, {_explain(tokens)}")
    except ValueError:
        # Also an integer with more digits than Python takes.
        return JsonStreamError("JSON parse error, number out of range")
    return value


def _finite(text: str) -> float:
    """The number, which must not be infinite: an answer that repeats it could not be written as JSON."""
    value = float(text)
    if math.isinf(value):
        raise ValueError("out of range")
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _DuplicateKeyError
    return members


def _requoted(token: _Token) -> bytes:
    """The token with double quotes around it if it has single ones."""
    if not token.text.startswith(b"'"):
        return token.text
    replacements = {b"\\'": b"'", b'"': b'\\"'}
    inside = re.sub(rb'\\.|"', lambda match: replacements.get(match.group(), match.group()), token.text[1:-1])
    return b'"' + inside + b'"'


def _explain(tokens: list[_Token]) -> str:
    """What is wrong with tokens that make no value: the first thing, from the left."""
    try:
        _Explainer().read(tokens)
    except _Wrong as wrong:
        return str(wrong)
    return "expecting value"


class _Wrong(Exception):
    pass


class _Expect(Protocol):
    """What may come next: takes a token and gives what is expected after it, None at the end."""

    def __call__(self, token: _Token, /) -> "_Expect | None": ...


class _Explainer:
    """Reads tokens as JSON's grammar would have them, and raises _Wrong where they differ.

    A state per expectation and a list of what is open, so that no nesting is too deep for it.
    """

    _BAD_KEY = b""

    def __init__(self) -> None:
        self._open: list[bytes] = []
        """A bracket or brace for each that is open; `_BAD_KEY` for a key that is no string."""

    def read(self, tokens: list[_Token]) -> None:
        expect: _Expect = self._value
        for token in tokens:
            following = expect(token)
            if following is None:
                return
            expect = following
        raise _Wrong("premature EOI")

    def _value(self, token: _Token) -> _Expect | None:
        if token.text in (b"{", b"["):
            self._open.append(token.text)
            return self._first_key if token.text == b"{" else self._first_element
        if token.kind == "keyword":
            if token.text not in (b"true", b"false", b"null"):
                raise _Wrong(f"invalid keyword '{token.text.decode()}'")
        elif token.kind == "string":
            _check_escapes(token.text.decode("utf-8", "replace"))
        elif token.kind != "number":
            raise _Wrong("expecting value")
        return self._after_value()

    def _after_value(self) -> _Expect | None:
        if not self._open:
            return None
        if self._open[-1] == self._BAD_KEY:
            raise _Wrong("key is not a string in object")
        return self._member_separator if self._open[-1] == b"{" else self._element_separator

    def _close(self) -> _Expect | None:
        self._open.pop()
        return self._after_value()

    def _first_key(self, token: _Token) -> _Expect | None:
        return self._close() if token.text == b"}" else self._key(token)

    def _key(self, token: _Token) -> _Expect | None:
        if token.kind != "string":
            self._open.append(self._BAD_KEY)
            return self._value(token)
        _check_escapes(token.text.decode("utf-8", "replace"))
        return self._colon

    def _colon(self, token: _Token) -> _Expect | None:
        if token.text != b":":
            raise _Wrong("missing : in object pair")
        return self._value

    def _member_separator(self, token: _Token) -> _Expect | None:
        if token.text == b"}":
            return self._close()
        if token.text != b",":
            raise _Wrong("expected separator in dict")
        return self._key

    def _first_element(self, token: _Token) -> _Expect | None:
        return self._close() if token.text == b"]" else self._value(token)

    def _element_separator(self, token: _Token) -> _Expect | None:
        if token.text == b"]":
            return self._close()
        if token.text != b",":
            raise _Wrong("expected separator in list")
        return self._value


def _check_escapes(text: str) -> None:
    """Raise _Wrong if a backslash in `text`, a string of the input, does not mean a character."""
    for match in re.finditer(r"\\(u.{0,4}|.)", text):
        escape = match.group(1)
        if escape[0] == "u":
            if not re.fullmatch(r"u[0-9a-fA-F]{4}", escape):
                raise _Wrong(f"\\{escape} is not a valid Unicode character")
        elif escape not in "\"'\\/bfnrt":
            raise _Wrong("invalid escape sequence in string")
