"""Blocking calls in threads: results, errors, and cancellation that waits."""

import asyncio
import threading

import pytest

from nbdbackup.block.executor import IoExecutor
from tests.support.gated import settle

LIMIT_S = 5.0


async def test_run_returns_the_result_or_raises() -> None:
    executor = IoExecutor("test")
    assert await executor.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await executor.run(divmod, 7, 0)
    executor.shutdown()


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_run_ends_only_when_the_call_has_ended(times: int) -> None:
    executor = IoExecutor("test")
    running, go_on = threading.Event(), threading.Event()

    def call() -> None:
        running.set()
        assert go_on.wait(LIMIT_S)

    task = asyncio.create_task(executor.run(call))
    async with asyncio.timeout(LIMIT_S):
        await asyncio.to_thread(running.wait, LIMIT_S)
        for _ in range(times):
            task.cancel()
            await settle()
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    executor.shutdown()


async def test_error_of_a_cancelled_run_is_not_left_unretrieved() -> None:
    executor = IoExecutor("test")
    running, go_on = threading.Event(), threading.Event()

    def call() -> None:
        running.set()
        assert go_on.wait(LIMIT_S)
        raise OSError(5, "lost")

    task = asyncio.create_task(executor.run(call))
    async with asyncio.timeout(LIMIT_S):
        await asyncio.to_thread(running.wait, LIMIT_S)
        task.cancel()
        await settle()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    executor.shutdown()


async def test_blocked_executor_does_not_hold_up_another() -> None:
    slow, quick = IoExecutor("slow", threads_max=1), IoExecutor("quick", threads_max=1)
    go_on = threading.Event()
    async with asyncio.timeout(LIMIT_S):
        blocked = asyncio.create_task(slow.run(go_on.wait, LIMIT_S))
        await settle()
        assert await quick.run(abs, -1) == 1
        assert not blocked.done()
        go_on.set()
        assert await blocked
    slow.shutdown()
    quick.shutdown()
