"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.cli.sizes import format_size, parse_size
from nbdbackup.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64KB", 65536),
        ("1M", 1 << 20),
        ("2G", 2 << 30),
        ("3T", 3 << 40),
        ("7E", 7 << 60),
        ("100B", 100),
    ],
)
def test_size_is_a_number_with_a_power_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.5G", "1 2", "64X", "0x10", "1KK", "8E", "9" * 30, "\u0661"]
)
def test_what_is_not_a_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@given(st.integers(0, 2**63 - 1))
def test_formatted_size_is_short(size: int) -> None:
    assert len(format_size(size)) <= 7


@given(st.integers(1, 1023), st.integers(0, 5))
def test_whole_units_survive_formatting_and_parsing(number: int, power: int) -> None:
    assert parse_size(format_size(number * 1024**power)) == number * 1024**power


def test_broken_size_has_one_decimal() -> None:
    assert format_size(1536 << 20) == "1.5G"
