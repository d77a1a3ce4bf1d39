"""Every case of the bench, as data: who is compared, at what, and what is expected.

Read it as the table that it is: a group of cases has one sentence in README.md, and a case its name, its
contenders with ours first, its load, and the pairs that are compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tests.bench.contenders import (
    CP,
    OURS,
    QEMU_IMG,
    TCP,
    TLS,
    Contender,
    Nbdkit,
    Ours,
    QemuNbd,
    StorageDaemon,
)
from tests.bench.figures import Pairs
from tests.bench.loads import (
    BlockStatus,
    Fairness,
    FreshClusters,
    FullPush,
    IncrementalPush,
    Load,
    Memory,
    Pull,
    PushLatency,
    Start,
    Transfer,
)
from tests.bench.room import FRAGMENT, FRAGMENT_EVERY, KIB, MIB

QSD = "qemu-storage-daemon"


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison; `fragmented`: over the fragmented disk, and not the full one."""

    group: str
    name: str
    what: str
    contenders: Sequence[Contender]
    load: Load
    pairs: Pairs = field(default_factory=Pairs)
    fragmented: bool = False


SERVERS = (Ours(), QemuNbd(), Nbdkit())
SMALL = {
    1: {"qemu-nbd": 1.5, "nbdkit": 1.2},
    16: {"qemu-nbd": 3.0, "nbdkit": 1.4},
    64: {"qemu-nbd": 3.0, "nbdkit": 1.4},
}
"""Expected of 4 KiB reads and writes, by depth."""
SEQUENTIAL = {"read": {"qemu-nbd": 1.8, "nbdkit": 1.4}, "write": {"qemu-nbd": 1.5, "nbdkit": 1.1}}
WORDS = {
    "randread": "random reads",
    "randwrite": "random writes",
    "randrw": "random requests, 70 % of them reads",
    "read": "sequential reads",
    "write": "sequential writes",
}
SIZES = {4 * KIB: ("4k", "4 KiB"), 64 * KIB: ("64k", "64 KiB"), MIB: ("1m", "1 MiB")}
BITMAPS = (
    Ours("no bitmap"),
    Ours("temporary bitmap", bitmap=("--temporary",)),
    Ours("persistent bitmap", bitmap=()),
    Ours("power-safe bitmap", options=("--bitmap-durability", "power"), bitmap=()),
)


def _transfer(
    group: str,
    load: Transfer,
    contenders: Sequence[Contender] = SERVERS,
    pairs: Pairs | None = None,
    suffix: str = "",
    where: str = "",
) -> Case:
    size, words = SIZES[load.block_bytes]
    name = f"{load.pattern}-{size}-d{load.depth}{suffix}"
    what = f"{words} {WORDS[load.pattern]}, depth {load.depth}{where}"
    return Case(group, name, what, contenders, load, pairs or Pairs())


def _transfers() -> Iterator[Case]:
    """One connection over a Unix socket."""
    for block in (4 * KIB, 64 * KIB):
        for pattern in ("randread", "randwrite", "randrw"):
            for depth in (1, 16, 64):
                small = block == 4 * KIB and pattern != "randrw"
                pairs = Pairs(expected=SMALL[depth]) if small else None
                yield _transfer(
                    "small" if block == 4 * KIB else "medium", Transfer(pattern, block, depth), pairs=pairs
                )
    asleep = Ours(f"{OURS} --poll-max-us 0", options=("--poll-max-us", "0"))
    for pattern in ("randread", "randwrite"):
        pairs = Pairs(expected={"qemu-nbd": 1.5, "nbdkit": 1.0})
        contenders = (asleep, QemuNbd(), Nbdkit(), Ours())
        load, where = Transfer(pattern, 4 * KIB, 1), ", our server not polling"
        yield _transfer("polling", load, contenders, pairs, suffix="-nopoll", where=where)
    plain = Ours(f"{OURS} without uvloop", without_uvloop=True)
    for pattern in ("randread", "randwrite"):
        for depth in (1, 16):
            load, where = Transfer(pattern, 4 * KIB, depth), ", our server without uvloop"
            yield _transfer("asyncio", load, (plain, Nbdkit(), Ours()), suffix="-asyncio", where=where)
    for pattern in ("read", "write"):
        yield _transfer("large", Transfer(pattern, MIB, 8), pairs=Pairs(expected=SEQUENTIAL[pattern]))


def _transports() -> Iterator[Case]:
    """Four connections, TCP, TLS."""
    for pattern, block, depth in (
        ("randread", 4 * KIB, 16),
        ("randwrite", 4 * KIB, 16),
        ("randrw", 4 * KIB, 16),
        ("randread", 64 * KIB, 16),
        ("randwrite", 64 * KIB, 16),
        ("read", MIB, 8),
        ("write", MIB, 8),
    ):
        load = Transfer(pattern, block, depth, connections=4)
        yield _transfer("connections", load, suffix="-c4", where=" on each of four connections")
    for group, where in ((TCP, " over TCP"), (TLS, " over TLS")):
        contenders = (Ours(transport=group), QemuNbd(group), Nbdkit(group))
        for pattern, block, depth in (
            ("randread", 4 * KIB, 1),
            ("randread", 4 * KIB, 16),
            ("randwrite", 4 * KIB, 1),
            ("randwrite", 4 * KIB, 16),
            ("randread", 64 * KIB, 16),
            ("read", MIB, 8),
            ("write", MIB, 8),
        ):
            yield _transfer(
                group, Transfer(pattern, block, depth), contenders, suffix=f"-{group}", where=where
            )


def _snapshots() -> Iterator[Case]:
    """What a snapshot costs its writers, beside qemu-storage-daemon's."""
    plain = (Ours(), StorageDaemon())
    fleecing = (
        Ours(snapshot=()),
        StorageDaemon(snapshot=True),
        Ours(f"{OURS} --temporary", snapshot=("--temporary",)),
    )
    for depth in (1, 16):
        what = f"4 KiB random writes, depth {depth}, "
        load = Transfer("randwrite", 4 * KIB, depth)
        yield Case("snapshot", f"snapshot-none-d{depth}", what + "no snapshot", plain, load)
        saved = Transfer("randwrite", 4 * KIB, depth, touched=True)
        yield Case(
            "snapshot", f"snapshot-saved-d{depth}", what + "every cluster is saved already", fleecing, saved
        )
        fresh = FreshClusters(depth)
        pairs = Pairs(expected={QSD: 3.0})
        yield Case(
            "snapshot", f"snapshot-fresh-d{depth}", what + "each to a fresh cluster", fleecing, fresh, pairs
        )


def _pulls() -> Iterator[Case]:
    contenders = (Ours(snapshot=()), StorageDaemon(snapshot=True))
    nbdcopy = ("nbdcopy", "--connections=4")
    expected = Pairs(expected={QSD: 1.5})
    null, to_file = Pull(nbdcopy, to_file=False), Pull(nbdcopy)
    what = "a snapshot is read by "
    yield Case(
        "pull", "pull-nbdcopy", what + "nbdcopy, four connections, to nowhere", contenders, null, expected
    )
    yield Case(
        "pull", "pull-nbdcopy-file", what + "nbdcopy, four connections, to a raw file", contenders, to_file
    )
    convert = Pull(("qemu-img", "convert", "-f", "raw", "-O", "raw"))
    yield Case("pull", "pull-qemu-img", what + "qemu-img convert, to a raw file", contenders, convert)


def _pushes() -> Iterator[Case]:
    offload = StorageDaemon(perf=(("use-copy-range", True),), name=f"{QSD}, use-copy-range")
    contenders = (Ours(), CP, QEMU_IMG, StorageDaemon(), offload, Ours("nbdbackup backup", by_command=True))
    expected = Pairs(expected={"cp": 0.9, QSD: 3.0})
    yield Case("push", "push-full", "a full backup to a raw file", contenders, FullPush(), expected)
    dirty = (Ours(bitmap=()), StorageDaemon(bitmap=True))
    yield Case("push", "push-incremental", "a backup of the 1 % that is dirty", dirty, IncrementalPush())
    what = "4 KiB random writes, depth 1, while a full backup runs"
    half = Pairs(expected={QSD: 2.0})
    yield Case("latency", "push-latency", what, (Ours(), StorageDaemon(), offload), PushLatency(), half)


def _footprint() -> Iterator[Case]:
    servers = (*SERVERS, StorageDaemon())
    yield Case(
        "footprint", "start", "until the first client is greeted", servers, Start(), Pairs(at_most=0.25)
    )
    yield Case("footprint", "memory-idle", "resident, just started", servers, Memory(), Pairs(at_most=60))
    load = Transfer("randrw", MIB, 64, connections=16)
    what = "most that was resident, 16 connections at depth 64 of 1 MiB"
    yield Case("footprint", "memory-load", what, servers, Memory(load), Pairs(at_most=400))


def _others() -> Iterator[Case]:
    what = f"the map of a disk with {FRAGMENT // KIB} KiB of data in every {FRAGMENT_EVERY // KIB} KiB"
    yield Case("status", "block-status", what, SERVERS, BlockStatus(), fragmented=True)
    for kind in ("read", "write"):
        what = f"4 KiB random {kind}s, depth 1, beside 1 MiB {kind}s, depth 64, of another client"
        yield Case("fairness", f"fairness-{kind}", what, SERVERS, Fairness(kind))


def _bitmaps() -> Iterator[Case]:
    """What it costs that changes are recorded, and that the record survives."""
    kept = Pairs(base="no bitmap", expected={"persistent bitmap": 0.95})
    unlimited = Pairs(base="no bitmap")
    for depth in (1, 16):
        clear = Transfer("randwrite", 4 * KIB, depth, ramp=False)
        dirty = Transfer("randwrite", 4 * KIB, depth, touched=True)
        for name, what, load, pairs in (
            ("random", "from a clear bitmap on", clear, kept),
            ("dirty", "all is dirty already", dirty, kept),
            ("fresh", "each sets a bit", FreshClusters(depth), unlimited),
        ):
            words = f"4 KiB random writes, depth {depth}, {what}"
            yield Case("bitmap", f"bitmap-{name}-d{depth}", words, BITMAPS, load, pairs)


CASES = (
    *_transfers(),
    *_transports(),
    *_snapshots(),
    *_bitmaps(),
    *_pulls(),
    *_pushes(),
    *_others(),
    *_footprint(),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def select(wanted: Sequence[str]) -> list[Case]:
    """The cases that one of `wanted` names: a case, a group, or a pattern with `*`; all, if none is wanted.

    Raises:
        SystemExit: one of them names nothing.
    """
    for name in wanted:
        if not any(_is_named(case, name) for case in CASES):
            raise SystemExit(f"bench: no case and no group is called {name}; --list shows them")
    return [case for case in CASES if not wanted or any(_is_named(case, name) for name in wanted)]


def _is_named(case: Case, name: str) -> bool:
    return case.group == name or fnmatchcase(case.name, name)
