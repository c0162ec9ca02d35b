"""What the acts are played on: the same few actions with Docker and without."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import Any, Literal, NamedTuple

from demo.broker import Broker
from demo.steps import CommandFailedError, PlayFailedError, Step
from servers.counters import GraphiteCounters, StatsdListener
from servers.etcd import EtcdClient, record_prefix
from servers.services import ServiceEndedError
from servers.web import fetch_json

SERVICES = ("order", "notify")

NO_ANSWER = (OSError, HTTPException, ValueError, KeyError)
"""What a request to a server may raise while the server starts, stops or is down."""

State = Literal["not started", "starting", "running", "not ready", "stopping", "stopped", "killed"]


class Setup(NamedTuple):
    """How the services run. With `calls`, the receiver runs too and notify calls it."""

    enable_etcd: bool = False
    calls: bool = False
    replicas: int = 1


class Stage(ABC):
    """The services and their servers. No service runs before the first `run_services`.

    `receiver`, which receives notifications, is stopped, started and logged like a service.
    """

    place: str
    """A sentence that says where everything runs."""
    farewell: str
    """A sentence that says where to look next."""
    receiver_url: str

    def __init__(
        self, broker: Broker, etcd: str, counters: GraphiteCounters | StatsdListener
    ) -> None:
        self.broker, self.counters, self._etcd = broker, counters, etcd
        self.states: dict[str, State] = dict.fromkeys(SERVICES, "not started")
        """The state of each service, as the steps have left it."""
        self.setup = Setup(replicas=0)
        """How the services run, or are to run with the next `run_services`."""

    def versions(self) -> list[str]:
        """Return the servers' names and versions; raises OSError."""
        answer: Any = fetch_json("GET", f"http://{self._etcd}/version")
        return [self.broker.version(), f"etcd {answer['etcdserver']}"]

    def orders(self, event_ids: Sequence[str]) -> tuple[list[int], int]:
        """Return how often each order was written, and by how many processes. Raises OSError."""
        etcd, records = EtcdClient(self._etcd), record_prefix("order")
        orders = etcd.get_all([f"/orders/{event_id}" for event_id in event_ids])
        recorded = etcd.get_all([records + event_id for event_id in event_ids])
        # A token begins with the random id of a process.
        tokens = [json.loads(record.value)["token"] for record in recorded]
        writers = {token.partition("/")[0] for token in tokens}
        return [order.version for order in orders], len(writers)

    @abstractmethod
    def run_services(self) -> Step:
        """Restart both services as `setup` says; wait until the first replica of each is ready."""

    @abstractmethod
    def crash_at(self, point: str, service: str) -> Step:
        """Restart a service that kills itself at a point of `chaos.crash_points`; wait likewise."""

    @abstractmethod
    def ended(self, service: str) -> bool:
        """Return whether a service that was started has ended."""

    @abstractmethod
    def stop(self, service: str) -> Step:
        """Stop a service and wait until it has ended."""

    @abstractmethod
    def start(self, service: str) -> Step:
        """Start a service again and wait until it is ready."""

    @abstractmethod
    def restart_services(self) -> Step:
        """Restart both services with the same settings and wait until they are ready."""

    @abstractmethod
    def wait_counted(self, counters: Sequence[str]) -> None:
        """Wait until `counters` include everything that the services have sent so far.

        Raises AssertionError or OSError if they do not within some seconds.
        """

    @abstractmethod
    def log(self, service: str) -> str:
        """Return the service's log, or the end of it."""

    @abstractmethod
    def _wait_ready(self, service: str) -> None:
        """Raise an error if the service does not get ready."""

    @property
    def _settings(self) -> dict[str, str]:
        settings = {"ENABLE_ETCD": "true" if self.setup.enable_etcd else "false"}
        return settings | ({"NOTIFY_URL": self.receiver_url} if self.setup.calls else {})

    def _typed_settings(self) -> str:
        return "".join(f"{name}={value} " for name, value in self._settings.items())

    def _bring_up(self, names: Sequence[str], start: Callable[[], object]) -> None:
        """Call `start`, and wait for those of `names` that are services. Raises PlayFailedError."""
        services = [name for name in names if name in SERVICES]
        self.states.update(dict.fromkeys(services, "starting"))
        start()
        for service in services:
            try:
                self._wait_ready(service)
            except (AssertionError, OSError, ServiceEndedError, CommandFailedError) as error:
                self.states[service] = "not ready"
                said = f"{service} does not get ready: {error}"
                raise PlayFailedError(said, service) from error
            self.states[service] = "running"
