"""What the acts are played on: the same few actions, whatever the servers run in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Literal, Protocol

SERVICES = ("order", "notify")


NO_ANSWER = (OSError, HTTPException, ValueError, KeyError)
"""What a question to a server raises that is not there, or that comes or goes."""


class CannotPlayError(Exception):
    """The demo cannot be played here; the message is one line that says what to do about it."""


class StepFailedError(Exception):
    """A step did not work out, through the fault of a service; the message is one line."""

    def __init__(self, message: str, service: str) -> None:
        super().__init__(message)
        self.service = service


@dataclass(frozen=True)
class Step:
    """Something to do: the command to type for it, and the function that does it.

    The function returns when it is done, and raises StepFailedError, CannotPlayError or OSError.
    """

    typed: str
    run: Callable[[], None]


State = Literal["not started", "starting", "running", "not ready", "stopping", "stopped"]
Points = Sequence[tuple[float, float]]
"""A counter's increases, each with its Unix time in seconds."""


class Stage(Protocol):
    """The services and their servers. Until the first `run_services` no service runs.

    A receiver of notifications, `receiver`, is stopped, started and has a log as they do.
    """

    place: str
    """Where all of it runs, as a sentence."""

    states: dict[str, State]
    """What each service does, as far as the steps tell."""

    def versions(self) -> list[str]:
        """Return the servers' names and versions; raises OSError."""

    def publish(self, event_id: str) -> Step:
        """Publish a new_order event over the broker's HTTP API."""

    def run_services(self, *, enable_etcd: bool, calls: bool) -> Step:
        """Run both services anew, with or without etcd, and wait until they are ready.

        With `calls` the receiver runs too, and notify calls it.
        """

    def stop(self, service: str) -> Step:
        """Stop a service and wait for its end."""

    def start(self, service: str) -> Step:
        """Start it again and wait until it is ready."""

    def restart_services(self) -> Step:
        """Restart both services as they are, and wait until they are ready."""

    def waiting(self, queue: str) -> int:
        """Return how many messages a queue holds that no consumer has; raises OSError."""

    def count(self, counter: str) -> int:
        """Return the sum of a counter so far; raises OSError."""

    def gauge(self, name: str) -> int:
        """Return the value of a gauge, 0 for one that nobody has set; raises OSError."""

    def points(self, counter: str) -> Points | None:
        """Return what is stored of a counter, None where nothing is stored; raises OSError."""

    def shown(self, counter: str) -> bool:
        """Return whether the counter has shown up, be it as 0; raises OSError."""

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Return when all that services have sent until now is in `count`.

        Raises AssertionError or OSError if that does not come to pass.
        """

    def log(self, service: str) -> str:
        """Return the service's log, or the end of it."""

    def farewell(self) -> str:
        """Say where to look next."""
