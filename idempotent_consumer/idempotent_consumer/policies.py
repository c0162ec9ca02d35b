"""How long to wait before trying again, by name. All of them go on until the service stops."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, wait_random_exponential
from tenacity.wait import wait_base

RECONNECT = wait_random_exponential(multiplier=0.25, max=5)
"""To a RabbitMQ node: jitter, so that a fleet does not return in one instant."""

COMMIT_AGAIN = wait_random_exponential(multiplier=0.05, max=2)
"""To etcd after an unknown outcome: soon at first, since every delivery in hand waits for it."""

HELD_CLAIM = wait_random_exponential(multiplier=0.1, max=1)
"""To a record that another process has claimed: it ends within one call or one lease."""


class Backoff:
    """A policy stepped by hand, for code that does its own waiting: on a timer, or on an event."""

    def __init__(self, policy: wait_base) -> None:
        self._policy = policy
        self.reset()

    def reset(self) -> None:
        """Begin anew, after a success."""
        self._state = RetryCallState(Retrying(wait=self._policy), None, (), {})

    @property
    def failures(self) -> int:
        """How many waits there have been since the last success."""
        return self._state.attempt_number - 1

    def next_s(self) -> float:
        """Return the seconds to wait this time."""
        wait_s = float(self._policy(self._state))
        self._state.attempt_number += 1
        return wait_s
