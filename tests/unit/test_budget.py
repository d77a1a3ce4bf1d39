"""ByteBudget: never more than the bound, in order, and nothing lost to cancellation."""

import asyncio

from nbdbackup.fleece.budget import ByteBudget
from tests.support.gated import settle


class Taker:
    """A task that takes `length` bytes and holds them until `let_go`."""

    def __init__(self, budget: ByteBudget, length: int) -> None:
        self.holds = False
        self.let_go = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._run(budget, length))

    async def _run(self, budget: ByteBudget, length: int) -> None:
        async with budget.take(length):
            self.holds = True
            await self.let_go.wait()

    async def end(self) -> None:
        self.let_go.set()
        async with asyncio.timeout(10):
            await self.task


async def test_takers_beyond_the_bound_wait_until_bytes_come_back() -> None:
    budget = ByteBudget(100)
    first, second = Taker(budget, 60), Taker(budget, 60)
    await settle()
    assert (first.holds, second.holds, budget.bytes_used) == (True, False, 60)
    await first.end()
    await settle()
    assert second.holds
    await second.end()
    assert budget.bytes_used == 0


async def test_more_than_everything_gets_everything() -> None:
    budget = ByteBudget(100)
    taker = Taker(budget, 1000)
    await settle()
    assert taker.holds
    assert budget.bytes_used == 100
    await taker.end()
    assert budget.bytes_used == 0


async def test_a_small_taker_does_not_overtake_a_large_one() -> None:
    budget = ByteBudget(100)
    holder, large, small = Taker(budget, 50), Taker(budget, 100), Taker(budget, 10)
    await settle()
    assert not large.holds
    assert not small.holds
    await holder.end()
    await settle()
    assert large.holds
    assert not small.holds
    await large.end()
    await small.end()
    assert budget.bytes_used == 0


async def test_a_taker_behind_a_cancelled_one_is_served_at_once() -> None:
    budget = ByteBudget(100)
    holder, large, small = Taker(budget, 50), Taker(budget, 100), Taker(budget, 10)
    await settle()
    large.task.cancel()
    await settle()
    assert small.holds
    await small.end()
    await holder.end()
    assert budget.bytes_used == 0


async def test_bytes_that_come_back_while_a_taker_is_being_cancelled_are_not_lost() -> None:
    budget = ByteBudget(100)
    holder, cancelled, last = Taker(budget, 100), Taker(budget, 100), Taker(budget, 100)
    await settle()
    # Both in one turn of the loop: the bytes come back before the cancelled task has run again.
    holder.let_go.set()
    await asyncio.sleep(0)
    cancelled.task.cancel()
    await settle()
    assert cancelled.task.cancelled()
    assert last.holds
    await last.end()
    await holder.end()
    assert budget.bytes_used == 0


async def test_a_cancelled_taker_that_has_not_run_yet_is_passed_over() -> None:
    budget = ByteBudget(100)
    cancelled_early: list[asyncio.Task[None]] = []

    async def give_back_after_cancelling() -> None:
        async with budget.take(100):
            await settle()
            cancelled_early[0].cancel()

    holder = asyncio.get_running_loop().create_task(give_back_after_cancelling())
    await asyncio.sleep(0)
    waiting = Taker(budget, 100)
    last = Taker(budget, 100)
    cancelled_early.append(waiting.task)
    async with asyncio.timeout(10):
        await holder
    await settle()
    assert waiting.task.cancelled()
    assert last.holds
    await last.end()
    assert budget.bytes_used == 0
