"""How an act is played: do a step and show it, then check what the counters say."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from demo.screen import Screen
from demo.stage import Stage, Step
from servers.wait import eventually

COUNTERS = {
    "orders_processed": "order",
    "orders_processed_skipped": "order",
    "notifications_processed": "notify",
    "notifications_processed_skipped": "notify",
}
"""The counters that the acts watch, and the services they belong to."""

_WITHIN_S = 20.0


class CheckFailedError(Exception):
    """A check has failed, and its cross has been shown; `service` is the one to look at."""

    def __init__(self, service: str) -> None:
        super().__init__(service)
        self.service = service


@dataclass(frozen=True)
class Change:
    """What is expected of a counter; with `by` 0 it must stay as it is."""

    text: str
    counter: str
    by: int


class Play:
    """A stage, a screen, and the counters as of the last check.

    Nobody else publishes, so each counter is known exactly at every moment.
    """

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self.stage = stage
        self.screen = screen
        self.passed = 0
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._enable_etcd: bool | None = None
        self._event_id = ""

    def do(self, step: Step) -> None:
        """Show the command, then do what it does."""
        self.screen.typed(step.typed)
        step.run()

    def run_services(self, *, enable_etcd: bool) -> None:
        """Have both services run with or without etcd: nothing is done where they do already."""
        if enable_etcd == self._enable_etcd:
            return
        first = self._enable_etcd is None
        self.do(self.stage.run_services(enable_etcd=enable_etcd))
        self._enable_etcd = enable_etcd
        if first:
            self._expect_zeros()

    def publish(self, event_id: str, text: str = "", times: int = 1) -> None:
        """Publish; once the command has been shown, `text` says what differs from it."""
        step = self.stage.publish(event_id)
        if self._event_id:
            typed = f"curl ...   ({text})"
        else:
            typed = step.typed + (f"   # {times} times" if times > 1 else "")
        self._event_id = event_id
        self.screen.typed(typed)
        for _ in range(times):
            step.run()

    def skipping(self, skipped: int) -> str:
        """Say what is skipped and why, given how much has been; or why nothing is."""
        if not self._enable_etcd:
            return "nothing: without etcd nobody remembers what is processed"
        if not skipped:
            return "nothing yet: each event was new"
        return f"{self._event_id}: etcd holds its record, so this copy is a duplicate"

    def expect_waiting(self, service: str, messages: int) -> None:
        """Check that so many messages wait in a service's queue."""
        passed = self._comes_true(partial(self._waiting, service, messages))
        self._check(passed, f"the queue {service} keeps {messages} event for it", service)

    def expect(self, *changes: Change) -> None:
        """Wait for changes of the counters, and check that they are exactly these."""
        for change in changes:
            self._comes_true(partial(self._reached, change))
        if any(change.by == 0 for change in changes):
            # That a counter stays is only known once all there was to count has been counted.
            self.stage.wait_counted([change.counter for change in changes])
        failed = [COUNTERS[change.counter] for change in changes if not self._matches(change)]
        if failed:
            raise CheckFailedError(failed[0])

    def _expect_zeros(self) -> None:
        """Check that every counter shows up by itself, as 0."""
        for counter, service in COUNTERS.items():
            if not self._comes_true(partial(self._shown_as_zero, counter)):
                self._check(False, f"{counter} shows as 0", service)
        self._check(True, "both services are ready, and their counters show as 0", "order")

    def _matches(self, change: Change) -> bool:
        before, after = self._counts[change.counter], self.stage.count(change.counter)
        expected = before + change.by
        self._counts[change.counter] = after
        seen = f"stays at {after}" if after == before else f"{before} -> {after}"
        wrong = "" if after == expected else f", but should be {expected}"
        self.screen.check(after == expected, change.text, f"{change.counter} {seen}{wrong}")
        self.passed += after == expected
        return after == expected

    def _check(self, passed: bool, text: str, service: str) -> None:
        self.screen.check(passed, text)
        if not passed:
            raise CheckFailedError(service)
        self.passed += 1

    def _comes_true(self, assertion: Callable[[], None]) -> bool:
        try:
            eventually(assertion, _WITHIN_S, also=(OSError,))
        except (AssertionError, OSError):
            return False
        return True

    def _shown_as_zero(self, counter: str) -> None:
        if not self.stage.shown(counter) or self.stage.count(counter):
            raise AssertionError(counter)

    def _reached(self, change: Change) -> None:
        if self.stage.count(change.counter) < self._counts[change.counter] + change.by:
            raise AssertionError(change.counter)

    def _waiting(self, service: str, messages: int) -> None:
        if self.stage.waiting(service) != messages:
            raise AssertionError(service)
