"""Exports: what clients are told, and what happens to them when an export goes."""

import pytest

from nbdbackup.block.device import Features
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import ConflictError, NotFoundError, UsageError
from nbdbackup.nbd.constants import TransmissionFlags as Flags
from nbdbackup.server.exports import ClientCatalog, Export, ExportTable
from nbdbackup.tls.names import PeerName, parse

SIZE = 4097
ALWAYS = (
    Flags.HAS_FLAGS
    | Flags.SEND_FLUSH
    | Flags.SEND_FUA
    | Flags.SEND_DF
    | Flags.CAN_MULTI_CONN
    | Flags.SEND_CACHE
)
CHANGES = Flags.SEND_TRIM | Flags.SEND_WRITE_ZEROES


def node(name: str = "disk", features: Features = Features(), read_only: bool = False) -> Node:  # noqa: B008
    device = FilterDevice(MemoryDevice(SIZE))
    device.features = features
    return Node(name, device, read_only)


def table(*names: str) -> ExportTable:
    exports = ExportTable()
    for name in names:
        exports.add(Export(name, node(name)))
    return exports


class FakeClient:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def disconnect(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.parametrize(
    ("export", "flags"),
    [
        (Export("disk", node()), ALWAYS | CHANGES),
        (Export("disk", node(features=Features(fast_zero=True))), ALWAYS | CHANGES | Flags.SEND_FAST_ZERO),
        (Export("disk", node(features=Features(rotational=True))), ALWAYS | CHANGES | Flags.ROTATIONAL),
        (Export("disk", node(), read_only=True), ALWAYS | Flags.READ_ONLY),
        (Export("disk", node(read_only=True)), ALWAYS | Flags.READ_ONLY),
        (
            Export("disk", node(features=Features(trim=True, fast_zero=True)), read_only=True),
            ALWAYS | Flags.READ_ONLY,
        ),
    ],
)
def test_54_55_57_flags_say_what_works(export: Export, flags: Flags) -> None:
    assert export.info().flags == flags


def test_the_size_is_exact() -> None:
    assert Export("disk", node()).info().size == SIZE


def test_37_the_first_export_is_the_default_one() -> None:
    exports = table("b", "a")
    assert exports.get("").name == "b"
    catalog = ClientCatalog(exports)
    found = catalog.find("")
    assert found is not None
    assert found.name == "b"
    assert [info.name for info in catalog.exports()] == ["b", "a"]


def test_what_is_not_there_is_not_found() -> None:
    for exports in (table(), table("disk")):
        with pytest.raises(NotFoundError, match="'other'"):
            exports.get("other")
        assert ClientCatalog(exports).find("other") is None
    assert ClientCatalog(table()).find("") is None


def test_a_name_can_be_used_once() -> None:
    exports = table("disk")
    with pytest.raises(ConflictError, match="'disk' already"):
        exports.add(Export("disk", node()))


@pytest.mark.parametrize(("name", "description"), [("x" * 4097, ""), ("disk", "x" * 4097), ("a\0b", "")])
def test_what_no_client_could_be_told_is_refused_when_it_is_added(name: str, description: str) -> None:
    exports = ExportTable()
    with pytest.raises(UsageError, match="cannot be sent"):
        exports.add(Export(name, node(), description))
    assert list(exports) == []


def test_a_removed_export_disconnects_its_clients_and_no_others() -> None:
    exports = table("disk", "other")
    clients = [FakeClient(), FakeClient()]
    bystander = FakeClient()
    exports.get("disk").clients.update(clients)
    exports.get("other").clients.add(bystander)
    exports.remove("disk", "it was dropped")
    assert [client.reasons for client in clients] == [["it was dropped"]] * 2
    assert bystander.reasons == []
    assert "disk" not in exports


@pytest.mark.parametrize(
    ("client", "shown"),
    [
        (None, ["open"]),
        (parse("O=x,CN=alice"), ["open", "secret"]),
        (parse("CN=alice"), ["open"]),
        ("key", ["open"]),
    ],
)
def test_export_for_certain_clients_is_not_there_for_others(
    client: PeerName | None, shown: list[str]
) -> None:
    exports = table("open")
    exports.add(Export("secret", node("secret"), authorised=(parse("CN=alice,O=x"),)))
    catalog = ClientCatalog(exports)
    # Before TLS, negotiation hides it as one for TLS alone.
    assert [info.tls_only for info in catalog.exports()] == [False, True]
    catalog.identify(client)
    assert [info.name for info in catalog.exports()] == shown
    assert (catalog.find("secret") is not None) == ("secret" in shown)


def test_view_of_a_node_is_for_those_whom_the_node_is_for() -> None:
    exports, secret = table("open"), node("secret")
    exports.add(Export("a", secret, tls_only=True, authorised=("alice",)))
    assert exports.access_to(secret) == (True, ("alice",))
    exports.add(Export("b", secret, authorised=("bob",)))
    assert exports.access_to(secret) == (True, ("alice", "bob"))
    exports.add(Export("c", secret))
    assert exports.access_to(secret) == (True, None)
    assert exports.access_to(exports.get("open").node) == (False, None)
