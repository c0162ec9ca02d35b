"""The stage without Docker: servers and services as child processes, no Graphite."""

import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from chaos.crash_points import VARIABLE as CRASH_POINT
from demo.broker import Broker
from demo.interrupt import ignore_interrupts
from demo.screen import Screen
from demo.stage import SERVICES, Stage
from demo.steps import CannotPlayError, PlayFailedError, Step
from servers.counters import StatsdListener, listen_statsd
from servers.processes import Child, ServersUnavailableError, free_port
from servers.servers import REPOSITORY, Servers, start_servers
from servers.services import Service, environment, run_service
from servers.wait import eventually


class LocalStage(Stage):
    """Starts a new process whenever a service starts. A statsd listener replaces Graphite."""

    place = "Processes of this machine; a statsd listener counts in Graphite's place."
    farewell = (
        "Where Docker runs, `make up` starts all of it to stay, with graphs at http://localhost/"
    )

    def __init__(
        self, servers: Servers, statsd: StatsdListener, directory: Path, processes: ExitStack
    ) -> None:
        self._statsd, self._directory, self._processes = statsd, directory, processes
        self._always = {**servers.settings(), **statsd.settings(), "LOG_FORMAT": "console"}
        self._running: dict[str, list[Child]] = {}
        self._receiver = Child(
            [sys.executable, "demo/receiver.py", "127.0.0.1", str(free_port())],
            env=environment(),
            cwd=REPOSITORY,
            log=directory / "receiver.log",
        )
        self.receiver_url = f"http://{':'.join(self._receiver.command[-2:])}"
        management_port = urlsplit(servers.rabbitmq.management_url).port or 0
        broker = Broker("127.0.0.1", servers.rabbitmq.amqp_port, management_port)
        super().__init__(broker, servers.etcd.endpoint, statsd)

    def run_services(self) -> Step:
        return self._restarted(SERVICES, *["receiver"] * self.setup.calls, *SERVICES)

    def crash_at(self, point: str, service: str) -> Step:
        return self._restarted([service], service, point=point)

    def ended(self, service: str) -> bool:
        return not any(process.running for process in self._running[service])

    def stop(self, service: str) -> Step:
        return Step(self._kill_command(service), partial(self._stop, service))

    def start(self, service: str) -> Step:
        return self._restarted([], service)

    def restart_services(self) -> Step:
        return self._restarted(SERVICES, *SERVICES)

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Send a counter of our own after theirs: a socket delivers its packets in order."""
        marker = f"demo_{secrets.token_hex(4)}"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"{marker}:1|c".encode(), ("127.0.0.1", self._statsd.port))

        def arrived() -> None:
            assert self._statsd.seen(marker), "the statsd listener does not keep up"

        eventually(arrived)

    def log(self, service: str) -> str:
        return "".join(process.output() for process in self._running.get(service, ()))

    def _start(self, services: Sequence[str], point: str) -> None:
        for service in services:
            self._running[service] = [
                self._run(service, point)
                for _ in range(self.setup.replicas if service in SERVICES else 1)
            ]

    def _wait_ready(self, service: str) -> None:
        for process in self._running[service]:
            if isinstance(process, Service):
                process.wait_ready()

    def _stop(self, *services: str) -> None:
        for service in services:
            self.states[service] = "stopping"
            for process in self._running[service]:
                try:
                    process.terminate()
                except TimeoutError as error:
                    raise PlayFailedError(str(error), service) from error
            self.states[service] = "stopped"

    def _run(self, service: str, point: str) -> Child:
        if service == "receiver":
            self._receiver.start()
            self._processes.callback(self._receiver.kill)
            return self._receiver
        settings = {**self._always, **self._settings, CRASH_POINT: point}
        command = [sys.executable, "-m", *_module(service, point).split()]
        running = run_service(service, settings, log_directory=self._directory, command=command)
        return self._processes.enter_context(running)

    def _restarted(self, ended: Sequence[str], *services: str, point: str = "") -> Step:
        """Return a step that stops the services of `ended` that run, and starts `services`."""

        def restart() -> None:
            self._stop(*(service for service in ended if service in self._running))
            self._bring_up(services, partial(self._start, services, point))

        typed = [self._kill_command(*ended), *(self._start_command(s, point) for s in services)]
        return Step("\n".join(filter(None, typed)), restart)

    def _start_command(self, service: str, point: str) -> str:
        if service == "receiver":
            return f"python {' '.join(self._receiver.command[1:])} &"
        settings = self._typed_settings() + f'{CRASH_POINT}="{point}" ' * bool(point)
        command = f"(cd {service} && {settings}python -m {_module(service, point)}) &"
        each = " ".join(str(number + 1) for number in range(self.setup.replicas))
        return f"for n in {each}; do {command} done" if self.setup.replicas > 1 else command

    def _kill_command(self, *services: str) -> str:
        processes = [process for name in services for process in self._running.get(name, ())]
        pids = " ".join(str(process.pid) for process in processes)
        return f"kill {pids}   # {' and '.join(services)}" if pids else ""


def _module(service: str, point: str) -> str:
    return f"chaos.crash_points {service}" if point else service


@contextmanager
def local_stage(screen: Screen) -> Iterator[LocalStage]:
    """Start the servers, and stop everything at the end. Raises CannotPlayError."""
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
            stack.callback(ignore_interrupts)
            yield LocalStage(servers, statsd, Path(directory), processes)
    except ServersUnavailableError as error:
        raise CannotPlayError(str(error)) from error
