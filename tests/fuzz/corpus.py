"""The kept corpus: `fixtures/corpus/TARGET/`, an input a file."""

import re
from pathlib import Path

DIRECTORY = Path(__file__).parents[2] / "fixtures" / "corpus"
INPUT_BYTES_MAX = 2048
"""Of an input: enough for several messages of any protocol here, and small enough to be quick."""

_FOUND_BY_FUZZER = re.compile(r"[0-9a-f]{40}")


def directory_of(target: str) -> Path:
    """Where the inputs of `target` are."""
    return DIRECTORY / target


def inputs_of(target: str) -> list[Path]:
    """All of them, in a fixed order; at least one."""
    return sorted(path for path in directory_of(target).iterdir() if path.is_file())


def is_named(path: Path) -> bool:
    """Whether somebody gave the input its name, so that it stays."""
    return _FOUND_BY_FUZZER.fullmatch(path.name) is None
