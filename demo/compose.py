"""The stage with Docker: steps are commands of a compose project, counters come from Graphite."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from demo.broker import Broker
from demo.interrupt import ignore_interrupts
from demo.screen import Screen
from demo.stage import SERVICES, Stage
from demo.steps import CannotPlayError, CommandFailedError, Step, run
from servers.counters import GraphiteCounters
from servers.processes import free_port
from servers.servers import REPOSITORY, compose_settings
from servers.services import environment
from servers.wait import eventually

FILES = ("docker-compose.yaml", "docker-compose.services.yaml")
RECEIVER = "demo/receiver.yaml"
CRASH = "demo/crash.yaml"
_SERVERS = ("rabbitmq", "etcd", "graphite-statsd")
_PULLED = (*_SERVERS, "receiver")
_GAUGES = "gauges"
_UP_WITHIN_S = 90.0
_DOWN_WITHIN_S = 60.0
_READY_WITHIN_S = 30.0
_FRESH_WITHIN_S = 15.0

# Runs inside the container, because the services publish no port.
_ASK_READY = """
from http.client import HTTPConnection
connection = HTTPConnection("localhost", 8080, timeout=2)
connection.request("GET", "/readyz")
answer = connection.getresponse()
raise SystemExit(None if answer.status == 200 else f"not ready: {answer.read().decode().strip()}")
"""


@dataclass(frozen=True)
class Ports:
    """The published ports by variable, and the address they are published on."""

    address: str
    numbers: Mapping[str, int]

    @property
    def host(self) -> str:
        """Where this machine reaches them."""
        return "127.0.0.1" if self.address in ("", "0.0.0.0", "::") else self.address

    @classmethod
    def read(cls, **defaults: str) -> Ports:
        """Read the ports of `.env`, and those that only have a default here.

        The environment wins, as with Compose. Raises CannotPlayError.
        """
        settings, numbers = compose_settings(), {}
        settings |= {name: os.environ.get(name) or port for name, port in defaults.items()}
        for name, value in settings.items():
            if name.startswith("PORT_"):
                if not value.isdecimal() or not 0 < int(value) < 65_536:
                    raise CannotPlayError(f"{name} is {value!r}: write a port, as in {name}=8080")
                numbers[name] = int(value)
        return cls(settings.get("PUBLISH_ADDRESS", ""), numbers)

    def elsewhere(self) -> Ports:
        """Return free ports instead, so that a second stack can run."""
        return Ports(self.address, {name: free_port() for name in self.numbers})

    def broker(self) -> Broker:
        return Broker(self.host, self.numbers["PORT_RABBITMQ"], self.numbers["PORT_RABBITMQ_UI"])

    def etcd(self) -> str:
        """Return etcd's endpoint."""
        return f"{self.host}:{self.numbers['PORT_ETCD']}"

    def settings(self) -> dict[str, str]:
        """Return the ports as Compose's variables."""
        return {name: str(number) for name, number in self.numbers.items()}

    def check_free(self, target: str) -> None:
        """Raise CannotPlayError if a port is in use. `target` is make's target to run instead."""
        if taken := [name for name in self.numbers if self._is_taken(name)]:
            listed = ", ".join(f"{self.numbers[name]} ({name})" for name in taken)
            others = " ".join(f"{name}={free_port()}" for name in taken)
            raise CannotPlayError(
                f"ports in use: {listed}. Stop what uses them (`make down` for this project's own "
                f"stack, `docker ps` lists containers), or choose others: {others} make {target}"
            )

    def _is_taken(self, name: str) -> bool:
        # The page runs in no container: it ignores PUBLISH_ADDRESS.
        address = ("127.0.0.1" if name == "PORT_PLAY" else self.host, self.numbers[name])
        if name == "PORT_STATSD":
            return _is_bound(address)
        # Not bind(): a port below 1024 is Docker's to bind, and perhaps not ours.
        try:
            socket.create_connection(address, timeout=2).close()
        except OSError:
            return False
        return True


def _is_bound(address: tuple[str, int]) -> bool:
    """Return whether something has a UDP port, where nothing answers a connection."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class Project(NamedTuple):
    """A compose project: its name, make's target for it, its files, the form of its logs."""

    name: str
    target: str
    files: Sequence[str]
    log_format: str


DEMO = Project("reliable-demo", "demo", (*FILES, RECEIVER), "console")


class Compose:
    """`docker compose` with a project, files and settings of its own."""

    def __init__(
        self, project: str, settings: Mapping[str, str], files: Sequence[str] = FILES
    ) -> None:
        named = [argument for name in files for argument in ("-f", str(REPOSITORY / name))]
        self._project, self._command = project, ["docker", "compose", "-p", project, *named]
        # The acts rely on the services' defaults. A profile could add example1, which publishes.
        self._environment = {**environment(), **settings}

    def set(self, **variables: str) -> None:
        """Set variables for the commands that follow."""
        self._environment.update(variables)

    def run(
        self, *arguments: str, timeout_s: float | None = None, show_progress: bool = False
    ) -> str:
        """Run one command and return its output; raises CannotPlayError."""
        command = [*self._command, *arguments]
        return run(command, self._environment, timeout_s=timeout_s, show_progress=show_progress)

    def up(self, replicas: Mapping[str, int], *flags: str, point: str = "") -> None:
        """Run this many replicas of each service with the settings; raises CannotPlayError.

        With `point`, one of `chaos.crash_points` such as "reply read:1", they kill themselves there
        and stay down. A container that is started again runs without it.
        """
        self._thaw(self._of(replicas))
        files = ["-f", str(REPOSITORY / CRASH)] if point else []
        scale = [f"--scale={service}={number}" for service, number in replicas.items()]
        # The images are built and the servers run already.
        up = ["up", "--detach", "--no-deps", "--no-build", *scale, *flags, *replicas]
        environment = {**self._environment, "CRASH_POINT": point}
        run([*self._command, *files, *up], environment, timeout_s=_UP_WITHIN_S)

    def docker(self, verb: str, name: str, *arguments: str) -> None:
        """Run a command of docker on a container, such as order-1; raises CannotPlayError."""
        if verb in ("stop", "start"):  # A frozen container would not react.
            self._thaw([name])
        self._docker(verb, [name], *arguments)

    def remove(self, *services: str) -> None:
        """Kill and remove all containers of services; raises CannotPlayError."""
        if names := self._of(services):
            self._docker("rm", names, "--force")

    def wipe(self, service: str) -> None:
        """Run a server again without its data; raises CannotPlayError."""
        self.remove(service)
        run(["docker", "volume", "rm", f"{self._project}_{service}-data"], self._environment)
        self.up({service: 1})

    def _thaw(self, names: Iterable[str]) -> None:
        with suppress(CommandFailedError):  # It fails for containers that run.
            self._docker("unpause", names)

    def _of(self, services: Iterable[str]) -> list[str]:
        """Return the names of all containers of services."""
        return [name for name in self.containers() if name.rpartition("-")[0] in services]

    def _docker(self, verb: str, names: Iterable[str], *arguments: str) -> None:
        containers = [f"{self._project}-{name}" for name in names]
        run(["docker", verb, *containers, *arguments], self._environment, timeout_s=_UP_WITHIN_S)

    def containers(self) -> dict[str, dict[str, str]]:
        """Return what `docker ps --all` says of each container, by a name such as order-1."""
        label = f"label=com.docker.compose.project={self._project}"
        listing = ("docker", "ps", "--all", "--no-trunc", "--filter", label, "--format", "json")
        listed = run(listing, self._environment, timeout_s=_DOWN_WITHIN_S)
        rows = map(json.loads, listed.splitlines())
        return {row["Names"].removeprefix(f"{self._project}-"): row for row in rows}

    def down(self) -> None:
        """Remove containers, volumes and network; raises CannotPlayError."""
        # The data is removed as well, so no orderly stop is needed.
        arguments = ("down", "--volumes", "--remove-orphans", "--timeout", "1")
        self.run(*arguments, timeout_s=_DOWN_WITHIN_S)
        if self.containers():
            # An interrupted command was still creating one.
            self.run(*arguments, timeout_s=_DOWN_WITHIN_S)


@contextmanager
def compose_servers(ports: Ports, screen: Screen, project: Project) -> Iterator[Compose]:
    """Build the images and start the servers, and remove it all at the end.

    Raises CannotPlayError, before anything is started where that is possible.
    """
    _check_plugins()
    settings = {**ports.settings(), "LOG_FORMAT": project.log_format}
    compose = Compose(project.name, settings, project.files)
    if compose.containers():
        raise CannotPlayError(
            "the stack of another run is there. If that run has ended, take the stack down with "
            f"`docker compose -p {project.name} down --volumes`"
        )
    ports.check_free(project.target)
    # A run that was killed while it took its stack down may have left volumes.
    compose.down()
    images = compose.run("config", "--images", *_PULLED).split()
    try:
        run(["docker", "image", "inspect", "--format", ".", *images], os.environ)
    except CommandFailedError:
        screen.say("Downloading the images of RabbitMQ, etcd and Graphite ...")
        compose.run("pull", *_PULLED, show_progress=True)
    screen.say("Building the images of order and notify (a minute or two at the first time) ...")
    compose.run("--progress", "plain", "build", *SERVICES, _GAUGES)
    try:
        screen.say("Starting RabbitMQ, etcd and Graphite ...")
        compose.run("up", "--detach", "--wait", *_SERVERS, _GAUGES)
        yield compose
    finally:
        ignore_interrupts()
        screen.say("")
        screen.say("Taking down what was started ...")
        compose.down()


def _check_plugins() -> None:
    for plugin, package in (("compose", "docker-compose"), ("buildx", "docker-buildx")):
        try:
            run(["docker", plugin, "version"], os.environ)
        except CannotPlayError:
            raise CannotPlayError(
                f"Docker answers, but `docker {plugin}` does not: install {package} (Debian's "
                f"package) or {package}-plugin (Docker's own)"
            ) from None


class ComposeStage(Stage):
    """Shows its commands as a user types them after `export COMPOSE_FILE=...`."""

    place = "Docker containers, of a compose project of their own."
    receiver_url = "http://receiver:8000"

    def __init__(self, compose: Compose, ports: Ports) -> None:
        self._compose = compose
        number = ports.numbers["PORT_GRAPHITE"]
        self._graphite_url = f"http://{ports.host}{'' if number == 80 else f':{number}'}"
        graphs = f"{self._graphite_url.replace('//127.0.0.1', '//localhost')}/dashboard/reliability"
        self.farewell = f"Now by hand: `make up`, the commands above, and the graphs on {graphs}"
        super().__init__(ports.broker(), ports.etcd(), GraphiteCounters(self._graphite_url))

    def run_services(self) -> Step:
        self._compose.set(**{"NOTIFY_URL": "", **self._settings})
        services, replicas = [*["receiver"] * self.setup.calls, *SERVICES], self.setup.replicas
        scales = [f"--scale {name}={replicas}" for name in SERVICES if replicas > 1]
        arguments = " ".join(["up -d", *scales, *services])
        # The images are built and the servers are healthy already.
        start = partial(self._compose.run, *arguments.split(), "--no-build", "--no-deps")
        typed = f"{self._typed_settings()}docker compose {arguments}"
        return Step(typed, partial(self._bring_up, services, start))

    def crash_at(self, point: str, service: str) -> Step:
        more = f'COMPOSE_FILE=$COMPOSE_FILE:{CRASH} CRASH_POINT="{point}" '
        typed = f"{self._typed_settings()}{more}docker compose up -d {service}"
        crash = partial(self._compose.up, {service: 1}, point=point)
        return Step(typed, partial(self._bring_up, [service], crash))

    def ended(self, service: str) -> bool:
        return bool(self._compose.run("ps", "--status", "exited", "--quiet", service))

    def stop(self, service: str) -> Step:
        return Step(f"docker compose stop {service}", partial(self._stop, service))

    def start(self, service: str) -> Step:
        return self._step("start", service)

    def restart_services(self) -> Step:
        return self._step("restart", *SERVICES)

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Wait for a newer point of each counter: statsd adds one every second, even a 0.

        A point has the time of its flush, rounded to a second. A point that is two seconds later
        than the current second was therefore flushed after this moment.
        """
        newer = GraphiteCounters(self._graphite_url, int(time.time()) + 2)

        def fresh() -> None:
            missing = [counter for counter in counters if not newer.seen(counter)]
            assert not missing, f"Graphite shows no new point of {', '.join(missing)}"

        eventually(fresh, _FRESH_WITHIN_S, also=(OSError,))

    def log(self, service: str) -> str:
        """Return the end of the service's log."""
        log = self._compose.run("logs", "--no-log-prefix", "--tail", "40", service)
        # Compose puts "erase this line" in front of each line, even on a pipe.
        return log.replace("\033[2K", "")

    def _step(self, verb: str, *services: str) -> Step:
        """Return a step that starts services and waits for them."""
        start = partial(self._compose.run, verb, *services)
        typed = f"docker compose {verb} {' '.join(services)}"
        return Step(typed, partial(self._bring_up, services, start))

    def _stop(self, service: str) -> None:
        self.states[service] = "stopping"
        self._compose.run("stop", service)
        self.states[service] = "stopped"

    def _wait_ready(self, service: str) -> None:
        def ask() -> None:
            self._compose.run("exec", "-T", service, "python", "-c", _ASK_READY)

        eventually(ask, _READY_WITHIN_S, also=(CommandFailedError,), interval_s=0.2)


@contextmanager
def compose_stage(screen: Screen) -> Iterator[ComposeStage]:
    """Start the stack; raises CannotPlayError."""
    screen.say(f"Docker answers: everything runs in a compose project of its own, {DEMO.name}.")
    ports = Ports.read()
    with compose_servers(ports, screen, DEMO) as compose:
        screen.say("To type the commands below yourself, once:")
        screen.typed(f"export COMPOSE_FILE={':'.join(DEMO.files)}")
        yield ComposeStage(compose, ports)
