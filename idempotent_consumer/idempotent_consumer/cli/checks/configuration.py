"""The settings, held against each other."""

from __future__ import annotations

from collections.abc import Iterator

from ...settings import Settings
from ..output import duration
from .finding import PROBLEM, WARNING, Finding, ok

BROKERS_CONSUMER_TIMEOUT_S = 1800
"""RabbitMQ's default: a delivery that is in hand for so long is given out again."""


def check(settings: Settings) -> Iterator[Finding]:
    """Check what the services share with this command, if their environment is the same."""
    if settings.enable_etcd:
        yield ok("settings", "ENABLE_ETCD is true")
    else:
        yield Finding(
            WARNING,
            "settings",
            "ENABLE_ETCD is false here: where the services have it so, each duplicate is processed",
            "set ENABLE_ETCD=true for the services",
        )
    yield _window(settings)


def _window(settings: Settings) -> Finding:
    """Check that a copy of an event cannot come back later than its record is kept.

    An event that is there twice can fail once and succeed once: the one that failed comes again
    after all its delays, when the record of the other has to be there.
    """
    window_s, retries_s = settings.dedup_window_s, sum(s for _, s in settings.retry_delays)
    if not window_s:
        return ok("settings", "records are kept for good (DEDUP_WINDOW=0)")
    window = f"DEDUP_WINDOW is {duration(window_s)}"
    if window_s <= retries_s:
        return Finding(
            PROBLEM,
            "settings",
            f"{window}, and a retry can come {duration(retries_s)} "
            "later (RETRY_DELAYS): a duplicate would be taken for a new event",
            f"set DEDUP_WINDOW well above {duration(retries_s)}",
        )
    longest_s = retries_s + BROKERS_CONSUMER_TIMEOUT_S
    if window_s <= longest_s:
        return Finding(
            WARNING,
            "settings",
            f"{window}; a copy that a stuck consumer holds comes "
            f"again after up to {duration(longest_s)}",
            f"set DEDUP_WINDOW well above {duration(longest_s)}",
        )
    return ok("settings", f"{window}, retries come within {duration(retries_s)}")
