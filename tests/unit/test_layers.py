"""Who may import whom: the layers of the package, checked against every module's imports.

A room may import itself, what is open to everyone (`errors`, `extents`), the rooms below it
that the table names, the standard library, and the third-party packages that belong to it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import nbdbackup

PACKAGE = Path(nbdbackup.__file__).parent
OPEN_TO_ALL = {"crash_points", "errors", "extents"}
BELOW_DAEMON = {"bitmap", "block", "fleece", "job", "monitor", "nbd", "server", "tls"}

ROOMS = {
    "crash_points": set[str](),
    "errors": set[str](),
    "extents": set[str](),
    "nbd": set[str](),
    "tls": set[str](),
    "bitmap": set[str](),
    "block": set[str](),
    "fleece": {"bitmap", "block"},
    "job": {"bitmap", "block", "fleece"},
    "server": {"bitmap", "block", "nbd", "tls"},
    "monitor": {"bitmap", "block", "fleece", "job", "server"},
    "daemon": BELOW_DAEMON,
    "cli": {*BELOW_DAEMON, "daemon"},
    "": {"cli"},
}
"""Which rooms a room may import; "" is the package's own `__init__` and `__main__`."""

EXTRA_ROOMS = {
    "block.nbd": {"nbd"},
    "block.nbd_connection": {"nbd", "tls"},
    "block.nbd_inquiry": {"nbd", "tls"},
    "block.nbd_journal": {"nbd"},
    "block.nbd_session": {"nbd"},
    "block.nbd_tls": {"nbd", "tls"},
    "block.open": {"nbd"},
}
"""Single modules that may import more than their room."""

THIRD_PARTY = {
    "construct": {"nbd", "block.qcow2", "bitmap.file_format", "fleece.snapshot_format"},
    "bitarray": {"bitmap", "fleece.frozen_copies"},
    "msgspec": set(ROOMS),
    "rich": {"cli"},
    "shtab": {"cli"},
    "qemu": {"cli"},
    "uvloop": {"daemon", "cli"},
    "isal": {"block"},
    "backports": {"block"},
}
"""Rooms, or single modules, that a third-party package belongs to."""

FORBIDDEN_STDLIB = {"nbd": {"asyncio", "select", "selectors", "socket", "ssl", "threading"}}
"""What would end a room's being sans-I/O."""

NOT_FOR_SERVE = ("rich", "qemu", "shtab")
"""Slow to import, and nothing that `serve` needs."""


@dataclass(frozen=True, slots=True)
class Import:
    """`module`, a dotted name, is imported in `line`."""

    module: str
    line: int


def name_of(path: Path) -> str:
    """The dotted name below the package: "block.file"; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part not in {"__init__", "__main__"})


MODULES = {path: name_of(path) for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno)


def own_module(name: str) -> str | None:
    """The module of this package that the import of dotted `name` loads, None for other packages."""
    parts = name.split(".")
    if parts[0] != "nbdbackup":
        return None
    known = set(MODULES.values())
    below = ".".join(parts[1:])
    # `from nbdbackup.a import b`: b may be a module or a name in one.
    return below if below in known else ".".join(parts[1:-1])


def complaints(path: Path) -> Iterator[str]:
    module = MODULES[path]
    room = room_of(module)
    allowed = {room} | OPEN_TO_ALL | ROOMS[room] | EXTRA_ROOMS.get(module, set())
    if room in OPEN_TO_ALL:
        allowed = {room}
    for found in imports_of(path):
        where = f"{path.relative_to(PACKAGE)}:{found.line}"
        own = own_module(found.module)
        top = found.module.split(".")[0]
        if own is not None:
            if own and room_of(own) not in allowed:
                yield f"{where}: {room or 'the package'} may not import {own}"
        elif top in sys.stdlib_module_names:
            if top in FORBIDDEN_STDLIB.get(room, set()):
                yield f"{where}: {room} may not import {top}"
        elif not {room, module} & THIRD_PARTY.get(top, set()):
            yield f"{where}: {top} does not belong in {room}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_its_layer_allows(path: Path) -> None:
    assert room_of(MODULES[path]) in ROOMS, "a new room needs a row in the table"
    assert list(complaints(path)) == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path, module in MODULES.items():
        targets = {own_module(found.module) for found in imports_of(path)}
        graph.setdefault(module, set()).update(target for target in targets if target and target != module)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_serve_starts_without_what_only_other_verbs_need() -> None:
    script = (
        "import sys, nbdbackup.cli.main, nbdbackup.cli.serve, nbdbackup.daemon\n"
        f"print(sorted(set({NOT_FOR_SERVE}) & set(sys.modules)))"
    )
    run = [sys.executable, "-c", script]
    loaded = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout == "[]\n"
