"""How long is waited between attempts."""

from __future__ import annotations

import pytest
from tenacity import wait_exponential, wait_fixed

from idempotent_consumer.policies import COMMIT_AGAIN, HELD_CLAIM, RECONNECT, Backoff

DOUBLING = wait_exponential(multiplier=1, max=8)


def test_a_backoff_grows_up_to_its_bound() -> None:
    backoff = Backoff(DOUBLING)
    assert [backoff.next_s() for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    assert backoff.failures == 6


def test_a_backoff_begins_anew_after_a_success() -> None:
    backoff = Backoff(DOUBLING)
    assert [backoff.next_s() for _ in range(3)] == [1, 2, 4]
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next_s() == 1


@pytest.mark.parametrize(
    ("policy", "bound_s"), [(RECONNECT, 5), (COMMIT_AGAIN, 2), (HELD_CLAIM, 1)]
)
def test_the_librarys_policies_are_bounded_and_have_jitter(
    policy: wait_fixed, bound_s: float
) -> None:
    waits = []
    for _ in range(50):
        backoff = Backoff(policy)
        waits.append([backoff.next_s() for _ in range(60)])
    assert all(0 <= wait_s <= bound_s for each in waits for wait_s in each)
    assert len({each[-1] for each in waits}) > 40, "no two processes wait equally long"
