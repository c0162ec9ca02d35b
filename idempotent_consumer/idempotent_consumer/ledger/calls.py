"""Calls to etcd that go on until their outcome is known, and that stop when etcd is not itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from structlog.typing import FilteringBoundLogger

from ..health import Health
from ..loop import Loop
from ..policies import COMMIT_AGAIN, Backoff
from . import messages as m
from .etcd import Client, EtcdError, Failure

_LINEARIZABLE = ("Txn", "Range")
"""A lease's reply carries the revision of the member asked, which may lag behind another's."""

Known = Callable[[Any, float], None]
"""Called on the loop with the reply, and the loop's time at which its request was sent."""


class Calls:
    """Sends requests until etcd has answered them; a failure is an outcome that is unknown.

    The revision of each linearizable reply is held against the highest seen before its request
    was sent: a lower one means that etcd was restored from an older snapshot. From then on
    (``halt``) nothing is answered any more, so nothing is settled on what that etcd says.
    """

    def __init__(
        self, client: Client, loop: Loop, health: Health, log: FilteringBoundLogger
    ) -> None:
        self._client, self._loop, self._health, self._log = client, loop, health, log
        self._revision = 0
        self._ended = False
        self._failing: set[str] = set()

    def once(
        self, method: str, request: Any, known: Known, failed: Callable[[EtcdError], None]
    ) -> None:
        """Send a request and return; one of the two is called on the loop when it has ended."""
        if self._ended:
            return
        sent_s = self._loop.now_s()
        floor = self._revision if method in _LINEARIZABLE else 0
        # A full etcd still answers reads, in transactions too: they say nothing of its writes.
        what = "Range" if method == "Txn" and not m.writes(request) else method

        def answered(reply: Any, error: EtcdError | None) -> None:
            if error is not None:
                self._loop.call_soon(partial(self._failed, what, error, failed))
            else:
                self._loop.call_soon(partial(self._answered, what, reply, known, sent_s, floor))

        self._client.call(method, request, answered)

    def until_known(self, method: str, make: Callable[[], Any], known: Known) -> None:
        """Make and send a request, again after each failure; hand its reply to ``known``."""
        backoff = Backoff(COMMIT_AGAIN)

        def send() -> None:
            self.once(method, make(), known, again)

        def again(_: EtcdError) -> None:
            self._loop.call_later(backoff.next_s(), send)

        send()

    def halt(self, why: str) -> None:
        """Answer nothing any more, and say why, until the service is started anew."""
        if not self._ended:
            self._ended = True
            self._health.lacks("etcd", why)
            self._log.critical(
                "etcd is not the one seen before: nothing is settled until this "
                "service is restarted, which accepts it as it is",
                reason=why,
            )

    @property
    def ended(self) -> bool:
        """Whether nothing is answered any more."""
        return self._ended

    def close(self) -> None:
        """Forget every call under way."""
        self._ended = True
        self._client.close()

    def _failed(self, what: str, error: EtcdError, failed: Callable[[EtcdError], None]) -> None:
        if self._ended:
            return
        if error.failure is not Failure.LEASE_NOT_FOUND:
            self._health.lacks("etcd", str(error))
            if not self._failing:
                self._log.warning(
                    "etcd does not answer: deliveries are held, and nothing is "
                    "settled until it does",
                    error=str(error),
                )
            self._failing.add(what)
        failed(error)

    def _answered(self, what: str, reply: Any, known: Known, sent_s: float, floor: int) -> None:
        if self._ended:
            return
        revision = reply.header.revision
        if revision < floor:
            self.halt(
                f"wiped, or restored from an older state: revision {revision}, {floor} seen before"
            )
            return
        self._revision = max(self._revision, revision)
        # It is back when nothing fails that failed before.
        if what in self._failing:
            self._failing.discard(what)
            if not self._failing:
                self._log.info("etcd answers again")
        if not self._failing:
            self._health.has("etcd")
        known(reply, sent_s)
