"""Calls and nothing else: as many threads as a service has, and the request that notify sends.

    python -m benchmarks.calling URL EVENTS

No broker, no etcd: what notify could do at the most, in one process.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import orjson
import urllib3

from .loading import new_events
from .outcome import outcome, timed
from .progress import Rate, Rates

CALLS = "calls alone: 16 threads"

ONE_IN = 4
"""Calls are slow: whoever makes one for each event gets one of so many events."""

_THREADS = 16
_ENDS_WITHIN_S = 60.0


def call_once(url: str, events: int) -> Rates:
    """Let a process make so many calls; raises NotMeasuredError."""
    told = outcome("benchmarks.calling", url, str(events), within_s=_ENDS_WITHIN_S)
    return {CALLS: Rate(**told)}


def call(url: str, events: int) -> None:
    """Make so many calls, and tell what that took."""
    http = urllib3.PoolManager(maxsize=_THREADS, retries=False)

    def post(bodies: Sequence[bytes]) -> None:
        for body in bodies:
            event = orjson.loads(body)
            key = {"Idempotency-Key": event["id"]}
            response = http.request("POST", url, json=event, headers=key)
            if response.status != 200:
                raise SystemExit(f"the sink answered {response.status}")

    bodies = new_events(events)
    with timed(events), ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(post, [bodies[thread::_THREADS] for thread in range(_THREADS)]))


if __name__ == "__main__":
    call(sys.argv[1], int(sys.argv[2]))
