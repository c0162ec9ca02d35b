"""A client of the etcd in memory, on a network that does what the test says."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..ledger.etcd import Answered, EtcdError, Failure
from .loop import ManualLoop
from .store import Store, refusal

TIMED_OUT = EtcdError(Failure.UNKNOWN, "Deadline Exceeded")


@dataclass(frozen=True)
class Fate:
    """What becomes of one request.

    It applies after ``applies_s``, or never where that is None. The reply comes after
    ``answers_s``, though not before it has applied; in its place, where ``error`` is set, that.
    """

    applies_s: float | None = 0.0
    answers_s: float = 0.0
    error: EtcdError | None = None


FINE = Fate()
REQUEST_LOST = Fate(None, error=TIMED_OUT)
ANSWER_LOST = Fate(error=TIMED_OUT)


def answered_late(seconds: float) -> Fate:
    """Apply at once; the reply takes its time."""
    return Fate(answers_s=seconds)


def applied_late(seconds: float) -> Fate:
    """Report an error at once, and apply all the same, later."""
    return Fate(seconds, error=TIMED_OUT)


def refused(text: str, failure: Failure = Failure.UNKNOWN) -> Fate:
    """Apply nothing, and answer with etcd's error."""
    return Fate(None, error=refusal(text, failure))


@dataclass(frozen=True)
class Call:
    """A request that was sent."""

    sent_s: float
    method: str
    request: Any


class FakeEtcd:
    """The ledger's Client. Each request meets the next fate of its method's ``script``.

    Where that is empty, ``fate`` decides: a caller with a seed hands over one of its own.
    Several clients may share a store.
    """

    def __init__(self, loop: ManualLoop, store: Store) -> None:
        self._loop, self.store = loop, store
        self._scripts: dict[str, deque[Fate]] = defaultdict(deque)
        self.fate: Callable[[str, Any], Fate] = lambda _method, _request: FINE
        self.calls: list[Call] = []
        self.closed = False

    def script(self, method: str, *fates: Fate) -> None:
        """Give the next requests of a method these fates."""
        self._scripts[method].extend(fates)

    def sent(self, method: str) -> list[Any]:
        """Return the requests sent with a method."""
        return [call.request for call in self.calls if call.method == method]

    def call(self, method: str, request: Any, answered: Answered) -> None:
        """Send a request and return at once."""
        self.calls.append(Call(self._loop.now_s(), method, request))
        if self.closed:
            answered(None, EtcdError(Failure.UNKNOWN, "Cannot invoke RPC on closed channel!"))
            return
        script = self._scripts[method]
        fate = script.popleft() if script else self.fate(method, request)
        outcome: list[tuple[Any, EtcdError | None]] = []
        if fate.applies_s is not None:
            self._loop.call_later(
                fate.applies_s, lambda: outcome.append(self._apply(method, request))
            )
        if fate.error is not None:
            self._loop.call_later(fate.answers_s, lambda: answered(None, fate.error))
        elif fate.applies_s is not None:
            answers_s = max(fate.answers_s, fate.applies_s)
            self._loop.call_later(answers_s, lambda: answered(*outcome[0]))

    def call_and_wait(self, method: str, request: Any) -> Any:
        """Do a request now, whatever the network does. Raises EtcdError."""
        return self.store.apply(method, request)

    def close(self) -> None:
        """Answer nothing more that is sent from now on."""
        self.closed = True

    def _apply(self, method: str, request: Any) -> tuple[Any, EtcdError | None]:
        try:
            return self.store.apply(method, request), None
        except EtcdError as error:
            return None, error
