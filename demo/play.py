"""How an act is played: show a step and do it, then check the counters."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from chaos.crash_points import PROOF
from demo.screen import Screen
from demo.stage import Setup, Stage
from demo.steps import PlayFailedError, Step
from servers.wait import eventually

NOUNS = {"order": "orders", "notify": "notifications"}
"""By service: what its counters count."""

COUNTERS = {
    f"{noun}_processed{skipped}": service
    for service, noun in NOUNS.items()
    for skipped in ("", "_skipped")
}
"""The counters that the acts check, and the service of each."""

_WITHIN_S = 20.0
_PROBED_WITHIN_S = 60.0
"""Within this time, an open circuit breaker tries a call at least twice."""


class Change(NamedTuple):
    """The change that is expected of a counter; `by` 0 means that it must not change."""

    text: str
    counter: str
    by: int


class Play:
    """A stage, a screen, and the counters as of the last check.

    Nobody else publishes, so the value of each counter is always known exactly. ``hold`` is called
    after a command is shown and before it is done.
    """

    def __init__(
        self, stage: Stage, screen: Screen, hold: Callable[[], None] = lambda: None
    ) -> None:
        self._hold = hold
        self.stage = stage
        self.screen = screen
        self.passed = 0
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._event_id, self._repeats = "", False

    def do(self, step: Step) -> None:
        self.screen.typed(step.typed)
        self._hold()
        step.run()

    def run_services(self, setup: Setup) -> None:
        """Run both services with this setup, unless they already do."""
        before = self.stage.setup
        if setup == before:
            return
        self.stage.setup = setup
        self.do(self.stage.run_services())
        if not before.replicas:
            self._expect_zeros()

    def publish(self, *event_ids: str, text: str = "") -> None:
        """Publish events. The command is shown once; later, `text` says what is different."""
        step, count = self.stage.broker.publish(*event_ids), len(event_ids)
        typed = step.typed + (f"   # {count} times" if count > 1 else "")
        if self._event_id:
            typed = f"curl ...   ({text})"
        self._repeats = len({*event_ids, self._event_id}) <= count
        self._event_id = event_ids[-1]
        self.do(Step(typed, step.run))

    def skipping(self, skipped: int) -> str:
        """Say what is skipped and why, or why nothing is, given the number of skipped events."""
        if not self.stage.setup.enable_etcd:
            return "nothing: without etcd nobody remembers what is processed"
        if not skipped or not self._repeats:
            return "nothing: each event is new"
        return f"{self._event_id}: etcd holds its record, so this copy is a duplicate"

    def expect_waiting(self, queue: str, messages: int, text: str) -> None:
        broker, service = self.stage.broker, queue.partition(".")[0]
        self._expect(text, service, lambda: broker.waiting(queue) == messages)

    def expect_consumers(self, service: str, consumers: int) -> None:
        text = f"{consumers} replicas of {service} consume from one queue"
        self._expect(text, service, lambda: self.stage.broker.consumers(service) == consumers)

    def expect_breaker(self, text: str, *, is_open: bool) -> None:
        """Check that notify's circuit breaker opens, or closes."""
        read, gauge = self.stage.counters.gauge, "notifications_breaker_open"
        self._expect(text, "notify", lambda: bool(read(gauge)) == is_open, _PROBED_WITHIN_S)

    def expect_called(self, event_ids: Sequence[str]) -> None:
        """Check that the receiver has accepted exactly one call for each of these events."""
        stage, called = self.stage, sorted(event_ids)
        text = f"the receiver was called once for each of {len(called)}"
        self._expect(text, "notify", lambda: sorted(stage.log("receiver").split()) == called)

    def expect_killed(self, service: str) -> None:
        """Check that a service has killed itself. What it had in flight is delivered again."""
        stage, text = self.stage, f"{service} is gone: it has killed itself"
        self._expect(text, service, lambda: stage.ended(service) and PROOF in stage.log(service))
        stage.states[service], self._repeats = "killed", True

    def expect_orders(self, event_ids: Sequence[str], text: str) -> None:
        """Check that etcd has the order of each of these events, and that it was written once."""
        versions, writers = self.stage.orders(event_ids)
        once = versions.count(1)
        seen = f"{once} of {len(event_ids)} in etcd with version 1, recorded by {writers} process"
        self._check(once == len(event_ids), text, "order", seen + "es" * (writers != 1))

    def expect(self, *changes: Change) -> None:
        """Wait for changes of the counters, and check that they are exactly these."""
        count = self.stage.counters.count
        goals = {name: self._counts[name] + by for _, name, by in changes}
        self._comes_true(lambda: all(count(name) >= goal for name, goal in goals.items()))
        if any(by == 0 for *_, by in changes):
            # Whether a counter stays is known only when everything has been counted.
            self.stage.wait_counted(list(goals))
        for text, name, _ in changes:
            before, goal = self._counts[name], goals[name]
            after = self._counts[name] = count(name)
            seen = f"{name} stays at {after}" if after == before else f"{name} {before} -> {after}"
            wrong = "" if after == goal else f", but should be {goal}"
            self._check(after == goal, text, COUNTERS[name], seen + wrong)

    def _expect_zeros(self) -> None:
        """Check that every counter is there before the first event, as 0."""
        counters = self.stage.counters

        def wrong() -> list[str]:
            return [name for name in COUNTERS if not counters.seen(name) or counters.count(name)]

        self._comes_true(lambda: not wrong())
        for counter in wrong():
            self._check(False, f"{counter} shows as 0", COUNTERS[counter])
        self._check(True, "both services are ready, and their counters show as 0", "order")

    def _expect(
        self, text: str, service: str, holds: Callable[[], bool], within_s: float = _WITHIN_S
    ) -> None:
        self._check(self._comes_true(holds, within_s), text, service)

    def _check(self, passed: bool, text: str, service: str, seen: str = "") -> None:
        if not passed:
            raise PlayFailedError(f"{text}: {seen}" if seen else text, service)
        self.screen.check(True, text, seen)
        self.passed += 1

    def _comes_true(self, holds: Callable[[], bool], within_s: float = _WITHIN_S) -> bool:
        def check() -> None:
            assert holds()

        try:
            eventually(check, within_s, also=(OSError,))
        except (AssertionError, OSError):
            return False
        return True
