"""The stage with Docker: steps are compose commands, counters come from Graphite."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from demo.broker import Broker, etcd_version
from demo.command import CommandFailedError
from demo.compose import PROJECT, Compose, compose_servers
from demo.ports import Ports
from demo.screen import Screen
from demo.stage import SERVICES, Points, State, Step, StepFailedError
from servers.graphite import GraphiteCounters
from servers.servers import REPOSITORY
from servers.wait import eventually

_READY_WITHIN_S = 30.0
_FRESH_WITHIN_S = 15.0

# Asked inside the container: the services publish no port.
_ASK_READY = """
from http.client import HTTPConnection
connection = HTTPConnection("localhost", 8080, timeout=2)
connection.request("GET", "/readyz")
answer = connection.getresponse()
raise SystemExit(None if answer.status == 200 else f"not ready: {answer.read().decode().strip()}")
"""


class ComposeStage:
    """Shows the commands as they are typed after `export COMPOSE_FILE=...`."""

    place = "Docker containers, of a compose project of their own."

    def __init__(self, compose: Compose, ports: Ports, since: float, *, keep: bool) -> None:
        self._compose, self._since, self._keep = compose, since, keep
        numbers = ports.numbers
        self._broker = Broker(ports.host, numbers["PORT_RABBITMQ"], numbers["PORT_RABBITMQ_UI"])
        self._etcd_url = f"http://{ports.host}:{numbers['PORT_ETCD']}"
        port = "" if numbers["PORT_GRAPHITE"] == 80 else f":{numbers['PORT_GRAPHITE']}"
        self._graphite_url = f"http://{ports.host}{port}"
        self._counters = GraphiteCounters(self._graphite_url, since)
        self.states: dict[str, State] = dict.fromkeys(SERVICES, "not started")

    def versions(self) -> list[str]:
        """Ask RabbitMQ and etcd."""
        return [self._broker.version(), etcd_version(self._etcd_url)]

    def publish(self, event_id: str) -> Step:
        """Publish over the management API."""
        return self._broker.publish(event_id)

    def run_services(self, *, enable_etcd: bool) -> Step:
        """Bring the services up; those that run with another setting are replaced."""
        self._compose.enable_etcd(enable_etcd)
        setting = "true" if enable_etcd else "false"
        return self._step(f"ENABLE_ETCD={setting} ", "up", "-d", *SERVICES)

    def stop(self, service: str) -> Step:
        """Stop the service's container."""
        return Step(f"docker compose stop {service}", lambda: self._stop(service))

    def start(self, service: str) -> Step:
        """Start the service's container."""
        return self._step("", "start", service)

    def restart_services(self) -> Step:
        """Restart the containers of both services."""
        return self._step("", "restart", *SERVICES)

    def waiting(self, queue: str) -> int:
        """Ask the broker."""
        return self._broker.waiting(queue)

    def count(self, counter: str) -> int:
        """Sum up Graphite's points since the demo began."""
        return self._counters.count(counter)

    def points(self, counter: str) -> Points:
        """Return Graphite's points since the demo began, one a second."""
        return self._counters.points(counter)

    def shown(self, counter: str) -> bool:
        """Ask Graphite for any point since the demo began."""
        return self._counters.seen(counter)

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Wait for a newer point of each: statsd adds one each second, be it 0.

        A point's time is that of its flush, rounded to a second. So one that is two seconds on
        from this second's start was flushed after this moment.
        """
        newer = GraphiteCounters(self._graphite_url, int(time.time()) + 2)

        def fresh() -> None:
            missing = [counter for counter in counters if not newer.seen(counter)]
            if missing:
                raise AssertionError(f"Graphite shows no new point of {', '.join(missing)}")

        eventually(fresh, _FRESH_WITHIN_S, also=(OSError,))

    def log(self, service: str) -> str:
        """Return the end of the service's log."""
        log = self._compose.run("logs", "--no-log-prefix", "--tail", "40", service)
        # Compose puts "erase this line" in front of each, on a pipe too.
        return log.replace("\033[2K", "")

    def farewell(self) -> str:
        """Say where the graphs are, of this stack if it is kept and else of the user's own."""
        url = self._graphite_url.removesuffix(":80").replace("//127.0.0.1", "//localhost")
        graphs = f"{url}/dashboard/reliability"
        if not self._keep:
            return f"Now by hand: `make up`, the commands above, and the graphs on {graphs}"
        return (
            f"The stack stays, and its graphs are on {graphs}\n"
            f"For the commands above: export COMPOSE_PROJECT_NAME={PROJECT}\n"
            f"To take it down: docker compose -p {PROJECT} down --volumes"
        )

    def _step(self, setting: str, verb: str, *arguments: str) -> Step:
        """Return a step that starts services and waits for them."""
        typed = f"{setting}docker compose {' '.join((verb, *arguments))}"
        services = [name for name in arguments if name in SERVICES]
        # The images are built and the servers healthy: nothing else is to be done here.
        flags = ("--no-build", "--no-deps") if verb == "up" else ()

        def start() -> None:
            self.states.update(dict.fromkeys(services, "starting"))
            self._compose.run(verb, *flags, *arguments)
            for service in services:
                self._wait_ready(service)

        return Step(typed, start)

    def _stop(self, service: str) -> None:
        self.states[service] = "stopping"
        self._compose.run("stop", service)
        self.states[service] = "stopped"

    def _wait_ready(self, service: str) -> None:
        def ask() -> None:
            self._compose.run("exec", "-T", service, "python", "-c", _ASK_READY)

        try:
            eventually(ask, _READY_WITHIN_S, also=(CommandFailedError,), interval_s=0.2)
        except CommandFailedError as error:
            self.states[service] = "not ready"
            raise StepFailedError(f"{service} does not get ready: {error.said}", service) from error
        self.states[service] = "running"


@contextmanager
def compose_stage(screen: Screen, *, keep: bool) -> Iterator[ComposeStage]:
    """Start the stack; raises CannotPlayError."""
    screen.say(f"Docker answers: everything runs in a compose project of its own, {PROJECT}.")
    ports = Ports.read(REPOSITORY / ".env")
    since = time.time()
    with compose_servers(REPOSITORY, ports, screen, keep=keep) as compose:
        screen.say("To type the commands below yourself, once:")
        screen.typed("export COMPOSE_FILE=docker-compose.yaml:docker-compose.services.yaml")
        yield ComposeStage(compose, ports, since, keep=keep)
