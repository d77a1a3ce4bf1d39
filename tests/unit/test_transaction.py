"""Transactions: all steps at one instant, or nothing has changed."""

import asyncio

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.daemon.transaction import Action, run_transaction
from nbdbackup.errors import ConflictError


class Recorded(Action):
    """Writes down what is asked of it; fails where it is told to."""

    def __init__(self, log: list[str], name: str, node: Node | None = None, fails_in: str = "") -> None:
        self._log = log
        self._name = name
        self._node = node
        self._fails_in = fails_in

    async def ready(self) -> None:
        self._note("ready")

    def nodes(self) -> tuple[Node, ...]:
        return () if self._node is None else (self._node,)

    def prepare(self) -> None:
        self._note("prepare")

    def commit(self) -> None:
        self._note("commit")

    def abort(self) -> None:
        self._note("abort")

    async def clean(self) -> None:
        self._note("clean")

    def _note(self, hook: str) -> None:
        still = "" if self._node is None else f" drained={self._node.is_drained}"
        self._log.append(f"{hook} {self._name}{still}")
        if hook == self._fails_in:
            raise ConflictError(f"{hook} of {self._name}")


async def test_all_are_prepared_while_every_node_stands_still_and_then_committed() -> None:
    log: list[str] = []
    a, b = Node("a", MemoryDevice(4096)), Node("b", MemoryDevice(4096))
    await run_transaction([Recorded(log, "1", a), Recorded(log, "2", b), Recorded(log, "3", a)])
    assert log == [
        *("ready 1 drained=False", "ready 2 drained=False", "ready 3 drained=False"),
        *("prepare 1 drained=True", "prepare 2 drained=True", "prepare 3 drained=True"),
        *("commit 1 drained=True", "commit 2 drained=True", "commit 3 drained=True"),
        *("clean 3 drained=False", "clean 2 drained=False", "clean 1 drained=False"),
    ]


async def test_a_failing_step_undoes_those_before_it_last_first() -> None:
    log: list[str] = []
    steps = [
        Recorded(log, "1"),
        Recorded(log, "2"),
        Recorded(log, "3", fails_in="prepare"),
        Recorded(log, "4"),
    ]
    with pytest.raises(ConflictError, match="prepare of 3"):
        await run_transaction(steps)
    assert log == [
        *("ready 1", "ready 2", "ready 3", "ready 4"),
        *("prepare 1", "prepare 2", "prepare 3", "abort 2", "abort 1"),
        *("clean 4", "clean 3", "clean 2", "clean 1"),
    ]


async def test_the_first_failing_step_is_the_one_that_is_told_of() -> None:
    """Step 2 cannot be made ready, but step 1 would have failed before it had its turn."""
    log: list[str] = []
    with pytest.raises(ConflictError, match="prepare of 1"):
        await run_transaction([Recorded(log, "1", fails_in="prepare"), Recorded(log, "2", fails_in="ready")])
    log.clear()
    with pytest.raises(ConflictError, match="ready of 2"):
        await run_transaction([Recorded(log, "1"), Recorded(log, "2", fails_in="ready"), Recorded(log, "3")])
    assert log == ["ready 1", "ready 2", "prepare 1", "abort 1", "clean 2", "clean 1"]


async def test_a_node_that_stood_still_for_a_failed_transaction_goes_on() -> None:
    node = Node("a", MemoryDevice(4096))
    with pytest.raises(ConflictError):
        await run_transaction([Recorded([], "1", node, fails_in="prepare")])
    await node.write(0, b"x")


async def test_every_step_is_cleaned_up_even_if_one_is_interrupted_in_it() -> None:
    log: list[str] = []

    class Interrupted(Recorded):
        async def clean(self) -> None:
            await super().clean()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run_transaction([Recorded(log, "1"), Interrupted(log, "2")])
    assert log[-2:] == ["clean 2", "clean 1"]
