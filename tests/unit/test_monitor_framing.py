"""JsonStream: whatever a client sends becomes values and errors, however it is cut up."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.job.events import Json
from nbdbackup.monitor.framing import (
    MESSAGE_BYTES_MAX,
    NESTING_MAX,
    TOKENS_MAX,
    JsonStream,
    JsonStreamError,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)  # fmt: skip
fragments = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b",", b":", b'"a"', b"'b'", b"1", b"-", b"true", b"x", b" ", b"\n", b'"',
         b"\\", b"@", b"'", b"e", b".", b'{"a":[1,2.5,"x\\"y"]}', b"\xff", b"\xc3\xa9", b"\x00"]
    ),
    max_size=12,
)  # fmt: skip


def _feed(*pieces: bytes) -> list[Json]:
    """The outcomes; an error is its text in a tuple."""
    stream = JsonStream()
    outcomes: list[Json] = []
    for piece in pieces:
        found = list(stream.feed(piece))
        outcomes += [(str(one),) if isinstance(one, JsonStreamError) else one for one in found]
    return outcomes


def _errors(data: bytes) -> list[str]:
    return [outcome[0] for outcome in _feed(data) if isinstance(outcome, tuple)]


@given(json_values, st.booleans())
def test_every_json_value_is_understood(value: Json, ascii_only: bool) -> None:
    text = json.dumps([value], ensure_ascii=ascii_only)
    assert _feed(text.encode()) == [[value]]


@given(fragments)
def test_byte_at_a_time_gives_the_same_as_one_chunk(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    assert _feed(*(bytes([byte]) for byte in data)) == _feed(data)


@given(fragments)
def test_a_message_after_garbage_and_closing_brackets_is_understood(pieces: list[bytes]) -> None:
    assert _feed(b"".join(pieces) + b"\n" + b"}]" * 12 + b'\n{"execute": 1}')[-1] == {"execute": 1}


def test_messages_need_nothing_between_them() -> None:
    assert _feed(b'{"a":1}{"a":2}[]"x"{}') == [{"a": 1}, {"a": 2}, [], "x", {}]


def test_strings_in_single_quotes_are_understood() -> None:
    assert _feed(b"{'a': 'it\\'s \"x\" \\\\'}") == [{"a": 'it\'s "x" \\'}]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"garbage\n", "invalid keyword 'garbage'"),
        (b'{"execute": bad}', "invalid keyword 'bad'"),
        (b"}", "expecting value"),
        (b'{"a":1,}', "expecting value"),
        (b'{"a" 1}', "missing : in object pair"),
        (b"{1:1}", "key is not a string in object"),
        (b'{"a":1 "b":2}', "expected separator in dict"),
        (b"[1 2]", "expected separator in list"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b"[01]", "stray '01'"),
        (b'"a\nb', "stray '\"a\n'"),
        (b"@ ", "stray '@'"),
        (b"NaN ", "stray 'N'"),
        (b"\xff", "stray '\N{REPLACEMENT CHARACTER}'"),
        (b'"\\q"', "invalid escape sequence in string"),
        (b'"\\u12"', '\\u12" is not a valid Unicode character'),
        (b'"\\uD800"', "\\uD800 is not a valid Unicode character"),
        (b'"\xed\xa0\x80"', "invalid UTF-8 sequence in string"),
    ],
)
def test_garbage_gets_qemus_text(data: bytes, text: str) -> None:
    assert _errors(data)[0] == f"JSON parse error, {text}"


def test_half_a_message_is_waited_for() -> None:
    for data in (b"", b"{", b'{"a', b'"\\', b"[1, ", b"nul", b"12", b"-", b"1e"):
        assert _feed(data) == []


@pytest.mark.parametrize(
    ("malformed", "reason"),
    [
        (b"{" * NESTING_MAX + b"]", "expecting value"),
        (b"[{" * (NESTING_MAX // 2) + b"}" * (NESTING_MAX // 2 + 1), "expected separator in list"),
        (b'{"a":[' * (NESTING_MAX // 2) + b"}" * (NESTING_MAX // 2 + 1), "expecting value"),
    ],
    ids=["braces", "mixed", "members"],
)
def test_what_is_wrong_is_said_at_any_depth(malformed: bytes, reason: str) -> None:
    assert _errors(malformed + b"\n")[0] == f"JSON parse error, {reason}"


def test_nesting_is_bounded_and_the_stream_goes_on() -> None:
    deepest = b"[" * NESTING_MAX + b"]" * NESTING_MAX
    assert not _errors(deepest)
    assert _errors(b"[" * (NESTING_MAX + 1)) == ["JSON nesting depth limit exceeded"]
    assert _feed(b"[" * (NESTING_MAX + 1) + b'{"a":1}')[-1] == {"a": 1}


def test_tokens_of_a_message_are_bounded() -> None:
    assert "JSON token count limit exceeded" in _errors(b"[" + b"1," * TOKENS_MAX)


@pytest.mark.parametrize("start", [b'"', b'["' + b"x" * 100 + b'", "', b"1", b"a"])
def test_size_of_a_message_is_bounded(start: bytes) -> None:
    stream = JsonStream()
    filler = (start[-1:] if start[-1:] != b'"' else b"x") * 65536
    outcomes: list[Json | JsonStreamError] = list(stream.feed(start))
    for _ in range(MESSAGE_BYTES_MAX // len(filler) + 1):
        outcomes += stream.feed(filler)
        if outcomes:
            break
    (outcome,) = outcomes
    assert isinstance(outcome, JsonStreamError)
    assert outcome.fatal


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 5000, "1." + "1" * 400 + "e400"])
def test_a_number_that_no_answer_could_repeat_is_refused_and_the_stream_goes_on(number: str) -> None:
    assert _feed(f'{{"id": {number}}} 1e308 '.encode()) == [("JSON parse error, number out of range",), 1e308]
