"""Poller: polls for a client that is served alone, and rests when that does not pay."""

import os

import pytest

from nbdbackup.server.polling import FOUND_MIN, REST_MAX, REST_MIN, WINDOW, Poller

ONE, OTHER = object(), object()


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def _served_alone() -> Poller:
    poller = Poller(1e-5)
    poller.pays(ONE)
    return poller


def _polled(poller: Poller, found: int, times: int = WINDOW) -> None:
    for number in range(times):
        poller.note(number < found)


def _rest(poller: Poller) -> int:
    """How many answers pass without a poll."""
    count = 0
    while not poller.pays(ONE):
        count += 1
        assert count <= REST_MAX
    return count


def test_a_client_that_is_served_alone_is_polled() -> None:
    poller = _served_alone()
    assert [poller.pays(ONE) for _ in range(3)] == [True] * 3


def test_nobody_is_polled_while_clients_take_turns() -> None:
    poller = _served_alone()
    assert not any(poller.pays(session) for session in (OTHER, ONE, OTHER, ONE))
    assert poller.pays(ONE)


@pytest.mark.parametrize("reason", ["not asked for", "one processor"])
def test_nobody_is_polled_where_it_cannot_pay(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "one processor":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    poller = Poller(0.0 if reason == "not asked for" else 1e-5)
    assert not any(poller.pays(ONE) for _ in range(3))


def test_it_goes_on_as_long_as_half_of_the_requests_are_there() -> None:
    poller = _served_alone()
    for _ in range(5):
        _polled(poller, FOUND_MIN)
        assert _rest(poller) == 0


def test_it_rests_longer_each_time_that_it_does_not_pay_and_not_for_ever() -> None:
    poller = _served_alone()
    rests = []
    for _ in range(12):
        _polled(poller, FOUND_MIN - 1)
        rests.append(_rest(poller))
    assert rests[:3] == [REST_MIN, 2 * REST_MIN, 4 * REST_MIN]
    assert rests[-1] == REST_MAX

    _polled(poller, WINDOW)
    _polled(poller, 0)
    assert _rest(poller) == REST_MIN
