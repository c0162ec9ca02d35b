"""How long is waited between attempts."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from tenacity import RetryCallState, Retrying, wait_exponential

from idempotent_consumer.system import Backoff, Jitter, claim_wait, commit_wait, reconnect_wait

DOUBLING = wait_exponential(multiplier=1, max=8)


def test_a_backoff_grows_up_to_its_bound_and_begins_anew_after_a_success() -> None:
    backoff = Backoff(DOUBLING)
    assert [backoff.next_s() for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    assert backoff.waits == 6
    backoff.reset()
    assert backoff.waits == 0
    assert backoff.next_s() == 1


@pytest.mark.parametrize(
    ("policy", "first_s", "longest_s"),
    [(reconnect_wait, 0.25, 5.0), (commit_wait, 0.05, 2.0), (claim_wait, 0.1, 1.0)],
)
def test_the_librarys_waits_are_bounded_and_have_jitter(
    policy: Callable[[Random], Jitter], first_s: float, longest_s: float
) -> None:
    waits = []
    for seed in range(50):
        backoff = Backoff(policy(Random(seed)))
        waits.append([backoff.next_s() for _ in range(60)])
    assert all(0 <= each[0] <= first_s for each in waits)
    assert all(0 <= wait_s <= longest_s for each in waits for wait_s in each)
    assert max(each[-1] for each in waits) > 0.8 * longest_s
    assert len({each[-1] for each in waits}) == 50, "no two processes wait equally long"


def test_a_wait_after_thousands_of_attempts_is_still_a_number() -> None:
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = 100_000
    assert 0 <= Jitter(Random(1), 0.05, 2.0)(state) <= 2.0
