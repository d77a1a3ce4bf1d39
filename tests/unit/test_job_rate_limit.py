"""The rate limit against a clock that moves when the test says so."""

import pytest

from nbdbackup.job.rate_limit import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_no_limit_never_waits(clock: Clock) -> None:
    limit = RateLimit(0, clock)
    limit.account(1 << 40)
    assert limit.delay_s() == 0


def test_quota_of_a_slice_can_be_used_at_once(clock: Clock) -> None:
    limit = RateLimit(1000, clock)
    limit.account(99)
    assert limit.delay_s() == 0
    limit.account(1)
    assert limit.delay_s() == pytest.approx(0.1)


def test_waits_for_the_end_of_the_slice(clock: Clock) -> None:
    limit = RateLimit(1000, clock)
    limit.account(100)
    clock.now_s += 0.06
    assert limit.delay_s() == pytest.approx(0.04)
    clock.now_s += 0.05
    assert limit.delay_s() == 0


def test_large_copy_is_paid_for_by_the_next_slices(clock: Clock) -> None:
    limit = RateLimit(1000, clock)
    limit.account(1500)
    assert limit.delay_s() == pytest.approx(1.5)
    clock.now_s += 1.4
    assert limit.delay_s() == pytest.approx(0.1)
    clock.now_s += 0.2
    assert limit.delay_s() == 0


def test_unused_quota_is_not_saved_up(clock: Clock) -> None:
    limit = RateLimit(1000, clock)
    clock.now_s += 3600
    limit.account(100)
    assert limit.delay_s() == pytest.approx(0.1)


def test_what_is_given_back_after_its_slice_is_no_credit(clock: Clock) -> None:
    limit = RateLimit(1000, clock)
    limit.account(50)
    limit.account(-20)
    limit.account(69)
    assert limit.delay_s() == 0
    clock.now_s += 10
    limit.account(-5000)
    limit.account(100)
    assert limit.delay_s() == pytest.approx(0.1)


def test_long_run_keeps_the_rate(clock: Clock) -> None:
    limit = RateLimit(1_000_000, clock)
    start_s, done_bytes = clock.now_s, 0
    while clock.now_s < start_s + 60:
        clock.now_s += limit.delay_s() + 0.0001
        if limit.delay_s() == 0:
            limit.account(65536)
            done_bytes += 65536
    assert done_bytes / 60 == pytest.approx(1_000_000, rel=0.01)


def test_raised_speed_shortens_a_wait_under_way(clock: Clock) -> None:
    limit = RateLimit(1, clock)
    limit.account(1000)
    assert limit.delay_s() > 900
    limit.set_speed(10_000)
    assert limit.delay_s() == pytest.approx(0.1)
    limit.set_speed(0)
    assert limit.delay_s() == 0


def test_what_was_copied_without_a_limit_does_not_count_later(clock: Clock) -> None:
    limit = RateLimit(0, clock)
    limit.account(1 << 40)
    limit.set_speed(1)
    assert limit.delay_s() == 0
