"""What nbdinfo tells of us beside what it tells of qemu-nbd with the same bytes: equal but for `BETTER`.

Debian 12's nbdinfo looks at qemu-nbd 7.2, Debian 13's at 10.0, which knows extended headers too.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB
from tests.support.foreign_servers import ForeignServer
from tests.support.newer_peers import newer
from tests.support.peers import require
from tests.support.processes import attempt, run

SIZE = 16 * MIB + 4096
DESCRIPTION = "a disk of a test"


@dataclass(frozen=True, slots=True)
class Difference:
    """`theirs` is what qemu-nbd tells, `ours` what we do; None: it depends on the machine."""

    theirs: object
    ours: object
    reason: str


ROTATIONAL = Difference(False, None, "we say what the kernel knows of the disk below, qemu-nbd never does")
BETTER: Mapping[str, Difference] = {"is_rotational": ROTATIONAL}
DEPTH = "qemu:allocation-depth"
"""Always offered by us, by qemu-nbd with -A, which the tests give it."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs of one distribution."""

    nbdinfo: list[str]
    qemu_nbd: list[str]


@pytest.fixture(params=["debian-12", "debian-13"])
def tools(request: pytest.FixtureRequest) -> Tools:
    if request.param == "debian-12":
        return Tools([require("nbdinfo")], [require("qemu-nbd")])
    return Tools(newer("nbdinfo"), newer("qemu-nbd"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data, holes, and zeroes that are allocated."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, data in (
            (MIB, b"x" * MIB),
            (5 * MIB, bytes(MIB)),
            (8 * MIB, b"y" * 70000),
            (SIZE - 1, b"z"),
        ):
            file.seek(offset)
            file.write(data)
    return path


@contextmanager
def beside(tools: Tools, serve: ServeFunction, disk: Path, *, read_only: bool) -> Iterator[tuple[str, str]]:
    """The URIs of `disk` by qemu-nbd, which gets a copy as it locks, and by us."""
    copy = disk.with_name("copy.img")
    run("cp", "--sparse=always", disk, copy)
    # `cp` punches what is zero; the map must be the same.
    with copy.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(bytes(MIB))
    flags = ["-r"] if read_only else []

    def command(path: Path) -> list[str]:
        words = [*tools.qemu_nbd, "-t", "-e", "0", "-A", "-f", "raw", "-x", "disk", "-D", DESCRIPTION]
        return [*words, *flags, "-k", str(path), str(copy)]

    ours = serve(disk=disk, options=["-D", DESCRIPTION, *flags])
    with ForeignServer(command) as theirs:
        yield theirs.uri("disk"), ours.uri("disk")


def print_beside(what: str, theirs: str, ours: str) -> None:
    """Both texts, line by line, for whoever reads the report of the tests."""
    left, right = theirs.splitlines(), ours.splitlines()
    width = max((len(line.expandtabs(4)) for line in left), default=0)
    print(f"--- nbdinfo {what}: qemu-nbd | nbdbackup")
    for index in range(max(len(left), len(right))):
        one = left[index].expandtabs(4) if index < len(left) else ""
        other = right[index].expandtabs(4) if index < len(right) else ""
        print(f"{one:{width}} {' ' if one == other else '|'} {other}")


def assert_equal_but_for(
    differences: Mapping[str, Difference], theirs: dict[str, object], ours: dict[str, object]
) -> None:
    for key in sorted({*theirs, *ours} - {"uri"}):
        one, other = theirs.get(key), ours.get(key)
        if key not in differences:
            assert one == other, key
            continue
        difference = differences[key]
        assert one == difference.theirs, (key, difference)
        assert difference.ours is None or other == difference.ours, (key, difference)


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
@pytest.mark.parametrize("words", [("--json",), ("--list", "--json")], ids=" ".join)
def test_nbdinfo_tells_the_same_of_an_export_but_for_what_is_better(
    serve: ServeFunction, disk: Path, tools: Tools, read_only: bool, words: tuple[str, ...]
) -> None:
    with beside(tools, serve, disk, read_only=read_only) as uris:
        texts = [run(*tools.nbdinfo, *words, uri) for uri in uris]
    print_beside(" ".join(words), *texts)
    theirs, ours = map(json.loads, texts)
    (their_export,), (our_export,) = theirs.pop("exports"), ours.pop("exports")
    assert_equal_but_for({}, theirs, ours)
    assert_equal_but_for(BETTER, their_export, our_export)


@pytest.mark.parametrize("words", [(), ("--list",)], ids=["", "--list"])
def test_nbdinfo_prints_the_same_lines_but_for_what_is_better(
    serve: ServeFunction, disk: Path, tools: Tools, words: tuple[str, ...]
) -> None:
    with beside(tools, serve, disk, read_only=False) as uris:
        texts = [run(*tools.nbdinfo, *words, uri) for uri in uris]
    print_beside(" ".join(words), *texts)

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if "uri:" not in line and "is_rotational" not in line]

    assert lines(texts[0]) == lines(texts[1])


@pytest.mark.parametrize(
    "words",
    [("--map",), ("--map", "--totals"), ("--map", "--json"), (f"--map={DEPTH}",), ("--size",)],
    ids=" ".join,
)
def test_nbdinfo_maps_and_measures_the_same(
    serve: ServeFunction, disk: Path, tools: Tools, words: tuple[str, ...]
) -> None:
    with beside(tools, serve, disk, read_only=False) as uris:
        texts = [run(*tools.nbdinfo, *words, uri) for uri in uris]
    print_beside(" ".join(words), *texts)
    assert texts[0] == texts[1]


QUESTIONS = (
    *(("--can", what) for what in ("trim", "zero", "fast-zero", "fua", "flush", "df", "multi-conn", "cache")),
    ("--is", "read-only"),
    ("--has", "structured-reply"),
)


def test_nbdinfo_answers_questions_the_same(serve: ServeFunction, disk: Path, tools: Tools) -> None:
    with beside(tools, serve, disk, read_only=False) as uris:
        for question in QUESTIONS:
            theirs, ours = (attempt(*tools.nbdinfo, *question, uri).returncode for uri in uris)
            print(f"{' '.join(question)}: {theirs} | {ours}")
            assert theirs == ours, question
