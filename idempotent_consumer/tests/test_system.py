"""The waits between attempts."""

from collections.abc import Callable
from random import Random

import pytest

from idempotent_consumer.system import Backoff, claim_wait, commit_wait, reconnect_wait


class Longest(Random):
    """Draws the upper bound."""

    def uniform(self, _: float, b: float) -> float:
        return b


def test_a_backoff_grows_up_to_its_bound_and_can_start_again() -> None:
    backoff = Backoff(Longest(), 1, 8)
    assert [backoff.next_s() for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    assert backoff.waits == 6
    backoff.waits = 0
    assert backoff.next_s() == 1
    backoff.waits = 10_000
    assert backoff.next_s() == 8, "no overflow after days"


@pytest.mark.parametrize(
    ("policy", "first_s", "longest_s"),
    [(reconnect_wait, 0.25, 5.0), (commit_wait, 0.05, 2.0), (claim_wait, 0.1, 1.0)],
)
def test_the_librarys_waits_are_bounded_and_have_jitter(
    policy: Callable[[Random], Backoff], first_s: float, longest_s: float
) -> None:
    waits = []
    for seed in range(50):
        backoff = policy(Random(seed))
        waits.append([backoff.next_s() for _ in range(60)])
    assert all(0 <= each[0] <= first_s for each in waits)
    assert all(0 <= wait_s <= longest_s for each in waits for wait_s in each)
    assert max(each[-1] for each in waits) > 0.8 * longest_s
    assert len({each[-1] for each in waits}) == 50, "no two processes wait equally long"
