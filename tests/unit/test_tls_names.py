"""Distinguished names: what is written in a list is what is in a certificate, or it is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbackup.errors import UsageError
from nbdbackup.tls import names
from nbdbackup.tls.names import DistinguishedName

ALICE = (
    (("countryName", "GB"),),
    (("organizationName", "Smith, Jones & Co"),),
    (("commonName", "alice"),),
)


def test_a_name_is_that_of_the_certificate_whichever_end_comes_first() -> None:
    alice = names.of_certificate({"subject": ALICE})
    assert alice is not None
    assert str(alice) == "CN=alice,O=Smith\\, Jones & Co,C=GB"
    for text in (
        str(alice),
        "C=GB,O=Smith\\, Jones & Co,CN=alice",
        " cn = alice , organizationName=Smith\\2c Jones & Co, C=GB ",
    ):
        assert names.is_authorised(alice, [names.parse(text)]), text


@pytest.mark.parametrize(
    "text",
    [
        "CN=alice",
        "CN=alice,O=Smith\\, Jones & Co,C=FR",
        "CN=alice,O=Smith\\, Jones & Co,C=GB,C=GB",
        "CN=Alice,O=Smith\\, Jones & Co,C=GB",
        "O=Smith\\, Jones & Co,CN=alice,C=GB",
        "CN=alice+O=Smith\\, Jones & Co,C=GB",
    ],
)
def test_a_name_that_is_a_part_or_in_another_order_is_another(text: str) -> None:
    assert not names.is_authorised(names.of_certificate({"subject": ALICE}), [names.parse(text)])


def test_a_certificate_without_a_subject_is_nobody() -> None:
    assert names.of_certificate({"subject": ()}) is None
    assert names.of_certificate(None) is None
    assert not names.is_authorised(None, [names.parse("CN=alice")])


@pytest.mark.parametrize(
    "text", ["", "alice", "CN=", "=x", "CN=a,,O=b", "CN=a\\", "CN=a,b", 'O="a"', "CN=#0c", "CN=\\ff"]
)
def test_what_is_no_name_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="no distinguished name") as caught:
        names.parse(text)
    assert "\n" not in str(caught.value)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text[0] != "#" and text.strip() == text
)
PARTS = st.lists(
    st.frozensets(st.tuples(st.sampled_from(["commonName", "organizationName", "1.2.3"]), TEXTS), min_size=1),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(parts=PARTS)
def test_what_is_shown_in_the_log_can_be_put_on_the_list(parts: list[frozenset[tuple[str, str]]]) -> None:
    name = DistinguishedName(tuple(parts))
    assert names.parse(str(name)) == name
    assert str(name).isprintable()


@settings(deadline=None)
@given(text=st.text())
def test_garbage_is_refused_and_never_crashes(text: str) -> None:
    try:
        names.parse(text)
    except UsageError:
        pass


def test_a_file_has_a_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text("# who may come in\n\nCN=alice,O=x\n  CN=bob,O=x\n")
    assert [str(name) for name in names.load(path)] == ["CN=alice,O=x", "CN=bob,O=x"]
    for content, told in (
        (b"CN=a\nnonsense\n", "'nonsense'"),
        (b"\xff", "UTF-8"),
        (b"#" * (2 << 20), "1 MiB"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=told):
            names.load(path)
    with pytest.raises(UsageError, match="No such file"):
        names.load(tmp_path / "none")
