"""What the demo takes for proof."""

import pytest

from nbdbackup.cli.demo import differences


def test_two_equal_copies_and_a_changed_disk_are_the_proof() -> None:
    assert differences("then", "then", "then", "now") == []


@pytest.mark.parametrize(
    ("hashes", "told"),
    [
        (("then", "now", "then", "now"), ["pull.img is not the point in time"]),
        (("then", "then", "now", "now"), ["push.img is not the point in time"]),
        (("then", "then", "then", "then"), ["the live disk has not changed"]),
    ],
)
def test_anything_else_is_named(hashes: tuple[str, str, str, str], told: list[str]) -> None:
    assert differences(*hashes) == told
