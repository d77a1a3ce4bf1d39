"""NBD URIs say where a server is, and survive the round trip whatever the names are."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.errors import UsageError
from nbdbackup.nbd import uri
from nbdbackup.nbd.uri import NbdUri

STRINGS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://h", NbdUri("", host="h")),
        ("nbd://h/", NbdUri("", host="h")),
        ("nbd:///disk", NbdUri("disk", host="localhost")),
        ("nbd://h:1234/disk", NbdUri("disk", host="h", port=1234)),
        ("nbd://h//disk", NbdUri("/disk", host="h")),
        ("nbd://h/a%2Fb+c", NbdUri("a/b+c", host="h")),
        ("nbd://[::1]:9/x", NbdUri("x", host="::1", port=9)),
        ("nbd+unix:///disk%40s1?socket=/run/x.sock", NbdUri("disk@s1", socket_path="/run/x.sock")),
        ("nbd+unix:///disk@s1?socket=/run/x.sock", NbdUri("disk@s1", socket_path="/run/x.sock")),
        ("nbd+unix://?socket=a%20b", NbdUri("", socket_path="a b")),
        ("nbds://me@h/x", NbdUri("x", host="h", tls=True, username="me")),
        (
            "nbds+unix:///x?socket=/s&tls-certificates=/pki",
            NbdUri("x", socket_path="/s", tls=True, tls_certificates="/pki"),
        ),
        (
            "nbds://h/x?tls-hostname=disks.example&tls-verify-peer=No",
            NbdUri("x", host="h", tls=True, tls_hostname="disks.example", tls_verify_peer=False),
        ),
        ("nbds://me@h/x?tls-psk-file=/k", NbdUri("x", host="h", tls=True, username="me", tls_psk_file="/k")),
        ("nbds://h?tls-verify-peer=1", NbdUri("", host="h", tls=True)),
        ("NBD://h/x", NbdUri("x", host="h")),
    ],
)
def test_uri_says_where_the_export_is(text: str, expected: NbdUri) -> None:
    assert uri.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "scheme"),
        ("disk.img", "scheme"),
        ("http://h/x", "scheme"),
        ("nbd:h", "scheme"),
        ("nbd+unix:///x", "socket=PATH"),
        ("nbd+unix:///x?socket=", "no value"),
        ("nbd+unix://h/x?socket=/s", "no host"),
        ("nbd://h/x?socket=/s", "nbd\\+unix"),
        ("nbd://h/x?tls-psk-file=/f", "needs nbds"),
        ("nbds://h/x?tls-verify-peer=maybe", "tls-verify-peer is 1 or 0"),
        ("nbd://h/x?tls-verify-peer=0", "needs nbds"),
        ("nbds://h/x?tls-hostname=%ff", "not UTF-8"),
        ("nbds://h/x?tls-certificates=/d&tls-psk-file=/f", "contradict each other"),
        ("nbds://h/x?tls-priority=NORMAL", "'tls-priority' is not known"),
        ("nbd+unix:///x?socket=/s&sokcet=/t", "'sokcet' is not known"),
        ("nbd+unix:///x?socket=/s&socket=/t", "twice"),
        ("nbd://h:0/x", "port 0"),
        ("nbd://h:99999/x", "[Pp]ort"),
        ("nbd://h:ab/x", "[Pp]ort"),
        ("nbd://[::1/x", "IPv6"),
        ("nbd://h/a b", "space"),
        ("nbd://h/a\nb", "control"),
        ("nbd://h/%ff", "UTF-8"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/x#y", "fragment"),
        ("nbd://me:secret@h/x", "password"),
        ("nbd://h/" + "x" * 4097, "longer than 4096"),
    ],
)
def test_uri_that_cannot_be_meant_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        uri.parse(text)
    assert "\n" not in str(caught.value)


def test_formatted_uris_are_what_other_tools_take() -> None:
    assert uri.format_tcp("127.0.0.1", 10809, "") == "nbd://127.0.0.1:10809"
    assert uri.format_tcp("127.0.0.1", 10809, "disk@s1") == "nbd://127.0.0.1:10809/disk%40s1"
    assert uri.format_tcp("::1", 1, "a") == "nbd://[::1]:1/a"
    assert uri.format_unix("/tmp/x/nbd.sock", "disk@s1") == "nbd+unix:///disk%40s1?socket=/tmp/x/nbd.sock"
    assert uri.format_unix("/tmp/a&b?c#d%", "") == "nbd+unix:///?socket=/tmp/a%26b%3Fc%23d%25"


@given(export=STRINGS, path=STRINGS.filter(bool), tls=st.booleans())
def test_every_unix_uri_survives_the_round_trip(export: str, path: str, tls: bool) -> None:
    meant = NbdUri(export, socket_path=path, tls=tls)
    assert uri.parse(str(meant)) == meant


@given(path=STRINGS.filter(bool), name=STRINGS.filter(str.isprintable).filter(bool), verify=st.booleans())
def test_every_tls_uri_survives_the_round_trip(path: str, name: str, verify: bool) -> None:
    meant = NbdUri("x", host="h", tls=True, tls_certificates=path, tls_hostname=name, tls_verify_peer=verify)
    assert uri.parse(str(meant)) == meant


def test_socket_path_that_is_not_utf8_survives_the_round_trip() -> None:
    path = os.fsdecode(b"/tmp/\xff.sock")
    text = uri.format_unix(path, "x")
    assert text == "nbd+unix:///x?socket=/tmp/%FF.sock"
    assert uri.parse(text).socket_path == path


@given(export=STRINGS, port=st.integers(1, 65535), host=st.sampled_from(["h", "127.0.0.1", "::1", "a.b"]))
def test_every_tcp_uri_survives_the_round_trip(export: str, port: int, host: str) -> None:
    assert uri.parse(uri.format_tcp(host, port, export)) == NbdUri(export, host=host, port=port)


@given(text=st.one_of(st.text(), st.text().map("nbd://".__add__), st.text().map("nbd+unix:///?".__add__)))
def test_garbage_is_refused_and_never_crashes(text: str) -> None:
    try:
        uri.parse(text)
    except UsageError:
        pass


@pytest.mark.parametrize(
    "text",
    [
        "nbd://\udc90\u2100" + "h" * 5000,
        "nbd://[\x9b" + "h" * 5000 + "]/",
        "nbd://h:" + "9" * 5000,
        "nbd://h/x?" + "k" * 5000 + "=1",
        "nbds://h/x?tls-verify-peer=" + "v" * 5000,
    ],
)
def test_a_refusal_repeats_little_of_the_uri_and_moves_no_terminal(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        uri.parse(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_only_nbd_schemes_make_a_uri() -> None:
    assert uri.is_uri("nbd://h")
    assert uri.is_uri("NBDS+UNIX:///x?socket=/s")
    assert not uri.is_uri("disk.img")
    assert not uri.is_uri("nbd:h")
