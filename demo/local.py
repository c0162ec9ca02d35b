"""The stage without Docker: servers and services as child processes, no Graphite."""

import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from demo.broker import Broker, etcd_version
from demo.interrupt import interrupt_no_more
from demo.screen import Screen
from demo.stage import SERVICES, CannotPlayError, State, Step, StepFailedError
from servers.counters import StatsdListener, listen_statsd
from servers.processes import Child, ServersUnavailableError, free_port
from servers.servers import REPOSITORY, Servers, start_servers
from servers.services import Service, ServiceEndedError, environment, run_service
from servers.wait import eventually


class LocalStage:
    """Runs each start of a service as a new process; a listener takes Graphite's place."""

    place = "Processes of this machine; a statsd listener counts in Graphite's place."

    def __init__(
        self, servers: Servers, statsd: StatsdListener, directory: Path, processes: ExitStack
    ) -> None:
        self._statsd, self._directory, self._processes = statsd, directory, processes
        self._settings = {**servers.settings(), **statsd.settings(), "LOG_FORMAT": "console"}
        self._shown: dict[str, str] = {}
        self._running: dict[str, Child] = {}
        self._receiver = ["demo/receiver.py", "127.0.0.1", str(free_port())]
        management_port = urlsplit(servers.rabbitmq.management_url).port or 0
        self._etcd_url = f"http://{servers.etcd.endpoint}"
        self.states: dict[str, State] = dict.fromkeys(SERVICES, "not started")
        self._broker = Broker("127.0.0.1", servers.rabbitmq.amqp_port, management_port)

    def versions(self) -> list[str]:
        """Ask RabbitMQ and etcd."""
        return [self._broker.version(), etcd_version(self._etcd_url)]

    def publish(self, event_id: str) -> Step:
        """Publish over the management API, as with Docker."""
        return self._broker.publish(event_id)

    def run_services(self, *, enable_etcd: bool, calls: bool) -> Step:
        """End the services that run, and run both with or without etcd."""
        self._shown = {"ENABLE_ETCD": "true" if enable_etcd else "false"}
        if calls:
            self._shown["NOTIFY_URL"] = f"http://{':'.join(self._receiver[1:])}"
        return self._restarted(*["receiver"] * calls, *SERVICES)

    def stop(self, service: str) -> Step:
        """End the service's process with SIGTERM."""
        typed = f"kill {self._running[service].pid}   # {service}"
        return Step(typed, partial(self._stop, service))

    def start(self, service: str) -> Step:
        """Run the service as it was."""
        return Step(self._start_command(service), partial(self._start, service))

    def restart_services(self) -> Step:
        """End both services and run them as they were."""
        return self._restarted(*SERVICES)

    def waiting(self, queue: str) -> int:
        """Ask the broker."""
        return self._broker.waiting(queue)

    def count(self, counter: str) -> int:
        """Ask the listener."""
        return self._statsd.count(counter)

    def gauge(self, name: str) -> int:
        """Ask the listener."""
        return self._statsd.gauge(name)

    def points(self, counter: str) -> None:
        """Return None: the listener keeps sums."""

    def shown(self, counter: str) -> bool:
        """Ask the listener."""
        return self._statsd.seen(counter)

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Send a counter of our own after theirs: one socket's packets come out in order."""
        marker = f"demo_{secrets.token_hex(4)}"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"{marker}:1|c".encode(), ("127.0.0.1", self._statsd.port))

        def arrived() -> None:
            if not self._statsd.seen(marker):
                raise AssertionError("the statsd listener does not keep up")

        eventually(arrived)

    def log(self, service: str) -> str:
        """Return what the service's newest process has written."""
        return self._running[service].output() if service in self._running else ""

    def farewell(self) -> str:
        """Say where to look next."""
        return "Where Docker runs, `make up` starts all of it to stay, with graphs at http://localhost/"

    def _start(self, *services: str) -> None:
        for service in services:
            self.states[service] = "starting"
            self._running[service] = self._processes.enter_context(self._run(service))
        for service in services:
            process = self._running[service]
            try:
                if isinstance(process, Service):
                    process.wait_ready()
            except (AssertionError, OSError, ServiceEndedError) as error:
                self.states[service] = "not ready"
                raise StepFailedError(str(error), service) from error
            self.states[service] = "running"

    def _stop(self, *services: str) -> None:
        for service in services:
            if service in self._running:
                self.states[service] = "stopping"
                try:
                    self._running[service].terminate()
                except TimeoutError as error:
                    raise StepFailedError(str(error), service) from error
                self.states[service] = "stopped"

    def _run(self, service: str) -> AbstractContextManager[Child]:
        if service == "receiver":
            return _run_receiver(self._receiver, self._directory)
        settings = {**self._settings, **self._shown}
        return run_service(service, settings, log_directory=self._directory)

    def _restarted(self, *services: str) -> Step:
        """Return a step that ends the services that run, and starts these."""

        def restart() -> None:
            self._stop(*SERVICES)
            self._start(*services)

        return Step(self._kill_command() + self._start_command(*services), restart)

    def _start_command(self, *services: str) -> str:
        shown = " ".join(f"{name}={value}" for name, value in self._shown.items())
        commands = {name: f"(cd {name} && {shown} python -m {name}) &" for name in SERVICES}
        commands["receiver"] = f"python {' '.join(self._receiver)} &"
        return "\n".join(commands[service] for service in services)

    def _kill_command(self) -> str:
        pids = [str(self._running[name].pid) for name in SERVICES if name in self._running]
        return f"kill {' '.join(pids)}   # {' and '.join(SERVICES)}\n" if pids else ""


@contextmanager
def _run_receiver(command: Sequence[str], directory: Path) -> Iterator[Child]:
    receiver = Child(
        [sys.executable, *command],
        env=environment(),
        cwd=REPOSITORY,
        log=directory / "receiver.log",
    )
    receiver.start()
    try:
        yield receiver
    finally:
        if receiver.running:
            receiver.kill()


@contextmanager
def local_stage(screen: Screen) -> Iterator[LocalStage]:
    """Start the servers, and leave nothing behind. Raises CannotPlayError."""
    screen.say(
        "Docker does not answer. So RabbitMQ and etcd run as processes of this machine, and a "
        "statsd listener counts in Graphite's place. Starting them ..."
    )
    try:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-"))
            servers = stack.enter_context(start_servers(kind="local"))
            statsd = stack.enter_context(listen_statsd())
            processes = stack.enter_context(ExitStack())
            stack.callback(interrupt_no_more)
            yield LocalStage(servers, statsd, Path(directory), processes)
    except ServersUnavailableError as error:
        raise CannotPlayError(str(error)) from error
