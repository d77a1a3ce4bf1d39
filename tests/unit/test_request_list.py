"""RequestList: who overlaps whom, and waiting for the end of it."""

import asyncio

import pytest

from nbdbackup.extents import Extent
from nbdbackup.fleece.request_list import RequestList
from tests.support.gated import settle


@pytest.mark.parametrize(
    ("area", "conflicts"),
    [
        (Extent(0, 100), False),
        (Extent(0, 101), True),
        (Extent(150, 1), True),
        (Extent(199, 10), True),
        (Extent(200, 10), False),
        (Extent(0, 1000), True),
    ],
)
def test_ranges_conflict_when_they_share_a_byte(area: Extent, conflicts: bool) -> None:
    requests = RequestList()
    with requests.hold(Extent(100, 100)):
        assert (requests.find_conflict(area) is not None) == conflicts
    assert requests.find_conflict(area) is None
    assert len(requests) == 0


def test_a_request_leaves_the_list_when_its_work_fails() -> None:
    requests = RequestList()
    with pytest.raises(OSError, match="broken"), requests.hold(Extent(0, 1)):
        raise OSError("broken")
    assert len(requests) == 0


async def test_waiting_goes_on_until_no_request_overlaps() -> None:
    requests = RequestList()
    first, second, elsewhere = (
        requests.hold(Extent(0, 100)),
        requests.hold(Extent(50, 100)),
        requests.hold(Extent(1000, 1)),
    )
    first.__enter__()
    second.__enter__()
    elsewhere.__enter__()
    waiting = asyncio.get_running_loop().create_task(requests.wait_no_conflict(Extent(60, 10)))
    await settle()
    assert not waiting.done()
    first.__exit__(None, None, None)
    await settle()
    assert not waiting.done()
    second.__exit__(None, None, None)
    await settle()
    assert waiting.done()
    elsewhere.__exit__(None, None, None)


async def test_a_waiter_sees_a_request_that_came_while_it_was_being_woken() -> None:
    requests = RequestList()
    first, second = requests.hold(Extent(0, 100)), requests.hold(Extent(0, 100))
    first.__enter__()
    waiting = asyncio.get_running_loop().create_task(requests.wait_no_conflict(Extent(0, 1)))
    await settle()
    first.__exit__(None, None, None)
    second.__enter__()
    await settle()
    assert not waiting.done()
    second.__exit__(None, None, None)
    async with asyncio.timeout(10):
        await waiting
