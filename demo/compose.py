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
from itertools import chain
from pathlib import Path

from demo.broker import Broker
from demo.interrupt import interrupt_no_more
from demo.screen import Screen
from demo.stage import SERVICES, Stage
from demo.steps import CannotPlayError, CommandFailedError, Step, StepFailedError, run
from servers.counters import GraphiteCounters
from servers.processes import free_port
from servers.servers import REPOSITORY, compose_settings
from servers.services import environment
from servers.wait import eventually

PROJECT = "reliable-demo"

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

_EVERY_ADDRESS = ("", "0.0.0.0", "::")
_UDP = frozenset({"PORT_STATSD"})
_PROJECT = "com.docker.compose.project"
_FORM = f'{{{{.Names}}}}\t{{{{.Label "{_PROJECT}.working_dir"}}}}\t{{{{.Label "{_PROJECT}"}}}}'

# Asked inside the container: the services publish no port.
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
        return "127.0.0.1" if self.address in _EVERY_ADDRESS else self.address

    @classmethod
    def read(cls, **others: str) -> Ports:
        """Read `.env`, and `others` with what they are unless the environment sets them.

        As with Compose, the environment wins. Raises CannotPlayError.
        """
        settings, numbers = compose_settings(), {}
        settings |= {name: os.environ.get(name) or port for name, port in others.items()}
        for name, value in settings.items():
            if name.startswith("PORT_"):
                if not value.isdecimal() or not 0 < int(value) < 65_536:
                    raise CannotPlayError(f"{name} is {value!r}: write a port, as in {name}=8080")
                numbers[name] = int(value)
        return cls(settings.get("PUBLISH_ADDRESS", ""), numbers)

    def elsewhere(self) -> Ports:
        """Return free ports in their place, so that another stack can run beside."""
        return Ports(self.address, {name: free_port() for name in self.numbers})

    def broker(self) -> Broker:
        """Return the RabbitMQ that is published on them."""
        return Broker(self.host, self.numbers["PORT_RABBITMQ"], self.numbers["PORT_RABBITMQ_UI"])

    def etcd(self) -> str:
        """Return the endpoint of the etcd that is published on them."""
        return f"{self.host}:{self.numbers['PORT_ETCD']}"

    def settings(self) -> dict[str, str]:
        """Return them as Compose's variables."""
        return {name: str(number) for name, number in self.numbers.items()}

    def check_free(self, repository: Path, target: str) -> None:
        """Raise CannotPlayError if one is taken: by what, and how to go on with make's target."""
        taken = [name for name in self.numbers if self._taken(name)]
        if not taken:
            return
        listed = ", ".join(f"{self.numbers[name]} ({name})" for name in taken)
        others = " ".join(f"{name}={free_port()}" for name in taken)
        raise CannotPlayError(
            f"in use: port{'s' * (len(taken) > 1)} {listed}. {self._advice(taken, repository)}, "
            f"or choose {'others' if len(taken) > 1 else 'another'}: {others} make {target}"
        )

    def _taken(self, name: str) -> bool:
        kind = socket.SOCK_DGRAM if name in _UDP else socket.SOCK_STREAM
        # The page is no container's: it is served here, whatever the others are published on.
        host = "127.0.0.1" if name == "PORT_PLAY" else self.address or "0.0.0.0"
        address = (host, self.numbers[name])
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                # Connections that have just ended do not count; with UDP it would hide a listener.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                # A port below 1024 is not ours to bind, but Docker's; then a listener tells.
                return error.errno == errno.EADDRINUSE or (
                    error.errno == errno.EACCES and self._answers(self.numbers[name])
                )
        return False

    def _answers(self, number: int) -> bool:
        try:
            socket.create_connection((self.host, number), timeout=2).close()
        except OSError:
            return False
        return True

    def _advice(self, taken: list[str], repository: Path) -> str:
        """Say how to free the ports, by the containers that publish them."""
        containers, stacks = set(), set()
        for name in taken:
            publish = f"publish={self.numbers[name]}/{'udp' if name in _UDP else 'tcp'}"
            listed = run(["docker", "ps", "--filter", publish, "--format", _FORM], os.environ)
            for line in listed.splitlines():
                container, directory, project = line.split("\t")
                containers.add(container)
                stacks.add((directory, project))
        if {directory for directory, _ in stacks} == {str(repository)}:
            projects = sorted(project for _, project in stacks)
            # Compose names a project after its directory, unless it is told otherwise.
            own = projects == [repository.name.lower()]
            downs = [f"`docker compose -p {project} down`" for project in projects]
            down = "`make down`" if own else " and ".join(downs)
            return f"This project's own stack is running: stop it with {down}"
        if containers:
            return f"Stop the containers with `docker stop {' '.join(sorted(containers))}`"
        return "Stop what uses " + ("them" if len(taken) > 1 else "it")


@dataclass(frozen=True)
class Project:
    """A compose project: its name, make's target for it, its files, the form of its logs."""

    name: str = PROJECT
    target: str = "demo"
    files: Sequence[str] = (*FILES, RECEIVER)
    log_format: str = "console"


DEMO = Project()


class Compose:
    """`docker compose` with a project, files and settings of its own."""

    def __init__(
        self,
        repository: Path,
        project: str,
        settings: Mapping[str, str],
        files: Sequence[str] = FILES,
    ) -> None:
        named = [argument for name in files for argument in ("-f", str(repository / name))]
        self._project, self._command = project, ["docker", "compose", "-p", project, *named]
        self._crash = ["-f", str(repository / CRASH)]
        # The acts rely on the services' defaults, and example1, in a profile, would publish too.
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

    def up(self, *flags: str, **replicas: int) -> None:
        """Have so many containers of each service, as the settings are; raises CannotPlayError."""
        self._thaw(self._of(replicas))
        self.run(*_up(replicas), *flags, timeout_s=_UP_WITHIN_S)

    def crash_at(self, point: str, service: str) -> None:
        """Run a service, as one replica, that ends itself with SIGKILL at a crash point.

        `point` is one of `chaos.crash_points` with a number, such as "reply read:1". The service
        stays down then, and is the plain one when its container is started again.
        """
        environment = {**self._environment, "CRASH_POINT": point}
        self._thaw(self._of([service]))
        run([*self._command, *self._crash, *_up({service: 1})], environment)

    def docker(self, verb: str, name: str, *arguments: str) -> None:
        """Run a command of docker on a container, such as order-1; raises CannotPlayError."""
        if verb in ("stop", "start"):  # A frozen one would not hear of it.
            self._thaw([name])
        self._docker(verb, [name], *arguments)

    def remove(self, *services: str) -> None:
        """Kill and remove all containers of services; raises CannotPlayError."""
        if names := self._of(services):
            self._docker("rm", names, "--force")

    def wipe(self, service: str) -> None:
        """Have a server without its data; raises CannotPlayError."""
        self.remove(service)
        run(["docker", "volume", "rm", f"{self._project}_{service}-data"], self._environment)
        self.up(**{service: 1})

    def _thaw(self, names: Iterable[str]) -> None:
        with suppress(CommandFailedError):  # It fails for those that are not frozen.
            self._docker("unpause", names)

    def _of(self, services: Iterable[str]) -> list[str]:
        """Return the names of all containers of services."""
        return [name for name in self.containers() if name.rpartition("-")[0] in services]

    def _docker(self, verb: str, names: Iterable[str], *arguments: str) -> None:
        containers = [f"{self._project}-{name}" for name in names]
        run(["docker", verb, *containers, *arguments], self._environment, timeout_s=_UP_WITHIN_S)

    def images_missing(self) -> bool:
        """Return whether an image of the servers has to be downloaded."""
        images = self.run("config", "--images", *_PULLED).split()
        try:
            run(["docker", "image", "inspect", "--format", ".", *images], self._environment)
        except CannotPlayError:
            return True
        return False

    def containers(self) -> dict[str, dict[str, str]]:
        """Return what `docker ps` says of each container, such as order-1, stopped ones too."""
        label = f"label={_PROJECT}={self._project}"
        listing = ("docker", "ps", "--all", "--no-trunc", "--filter", label, "--format", "json")
        listed = run(listing, self._environment, timeout_s=_DOWN_WITHIN_S)
        rows = map(json.loads, listed.splitlines())
        return {row["Names"].removeprefix(f"{self._project}-"): row for row in rows}

    def down(self) -> None:
        """Remove containers, volumes and network; raises CannotPlayError."""
        # What is removed with its data needs no orderly stop.
        arguments = ("down", "--volumes", "--remove-orphans", "--timeout", "1")
        self.run(*arguments, timeout_s=_DOWN_WITHIN_S)
        if self.containers():
            # One was still being created, by a command that was interrupted.
            self.run(*arguments, timeout_s=_DOWN_WITHIN_S)


def _up(replicas: Mapping[str, int]) -> list[str]:
    # The images are built and the servers run: nothing else is to be done.
    scale = [f"--scale={service}={number}" for service, number in replicas.items()]
    return ["up", "--detach", "--no-deps", "--no-build", *scale, *replicas]


@contextmanager
def compose_servers(
    repository: Path, ports: Ports, screen: Screen, *, keep: bool, project: Project = DEMO
) -> Iterator[Compose]:
    """Build the images and start the servers; at the end remove it all, unless to be kept.

    Raises CannotPlayError, before anything is started where that is possible.
    """
    _check_plugins()
    settings = {**ports.settings(), "LOG_FORMAT": project.log_format}
    compose = Compose(repository, project.name, settings, project.files)
    if compose.containers():
        raise CannotPlayError(
            f"the demo's stack is there already: another demo runs, or one was kept. Take it down "
            f"with `docker compose -p {project.name} down --volumes`"
        )
    ports.check_free(repository, project.target)
    # A demo that was killed while it took its stack down may have left volumes.
    compose.down()
    if compose.images_missing():
        screen.say("Downloading the images of RabbitMQ, etcd and Graphite ...")
        compose.run("pull", *_PULLED, show_progress=True)
    screen.say("Building the images of order and notify (a minute or two at the first time) ...")
    compose.run("--progress", "plain", "build", *SERVICES, _GAUGES)
    try:
        screen.say("Starting RabbitMQ, etcd and Graphite ...")
        compose.run("up", "--detach", "--wait", *_SERVERS, _GAUGES)
        yield compose
    finally:
        interrupt_no_more()
        if not keep:
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
    """Shows the commands as they are typed after `export COMPOSE_FILE=...`."""

    place = "Docker containers, of a compose project of their own."

    def __init__(self, compose: Compose, ports: Ports, since: float, *, keep: bool) -> None:
        self._compose, self._keep = compose, keep
        number = ports.numbers["PORT_GRAPHITE"]
        self._graphite_url = f"http://{ports.host}{'' if number == 80 else f':{number}'}"
        counters = GraphiteCounters(self._graphite_url, since)
        super().__init__(ports.broker(), ports.etcd(), counters)

    def run_services(self, *, enable_etcd: bool, calls: bool, replicas: int) -> Step:
        url = "http://receiver:8000" if calls else ""
        self._set(enable_etcd=enable_etcd, receiver_url=url, replicas=replicas)
        self._compose.set(**{"NOTIFY_URL": "", **self._settings})
        scales = [("--scale", f"{name}={replicas}") for name in SERVICES if replicas > 1]
        return self._step("up", "-d", *chain(*scales), *["receiver"] * calls, *SERVICES)

    def crash_at(self, point: str, service: str) -> Step:
        more = f'COMPOSE_FILE=$COMPOSE_FILE:{CRASH} CRASH_POINT="{point}" '
        typed = f"{self._typed_settings()}{more}docker compose up -d {service}"
        crash = partial(self._compose.crash_at, point, service)
        return Step(typed, partial(self._bring_up, [service], crash))

    def ended(self, service: str) -> bool:
        return bool(self._compose.run("ps", "--status", "exited", "--quiet", service))

    def stop(self, service: str) -> Step:
        return Step(f"docker compose stop {service}", lambda: self._stop(service))

    def start(self, service: str) -> Step:
        return self._step("start", service)

    def restart_services(self) -> Step:
        return self._step("restart", *SERVICES)

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Wait for a newer point of each: statsd adds one each second, be it 0.

        A point's time is that of its flush, rounded to a second. So one that is two seconds on
        from this second's start was flushed after this moment.
        """
        newer = GraphiteCounters(self._graphite_url, int(time.time()) + 2)

        def fresh() -> None:
            missing = [counter for counter in counters if not newer.seen(counter)]
            assert not missing, f"Graphite shows no new point of {', '.join(missing)}"

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

    def _step(self, verb: str, *arguments: str) -> Step:
        """Return a step that starts services and waits for them."""
        setting = self._typed_settings() if verb == "up" else ""
        services = [name for name in arguments if name in SERVICES]
        # The images are built and the servers healthy: nothing else is to be done here.
        flags = ("--no-build", "--no-deps") if verb == "up" else ()
        start = partial(self._compose.run, verb, *flags, *arguments)
        typed = f"{setting}docker compose {' '.join((verb, *arguments))}"
        return Step(typed, partial(self._bring_up, services, start))

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
            raise StepFailedError(f"{service} does not get ready: {error.said}", service) from error


@contextmanager
def compose_stage(screen: Screen, *, keep: bool) -> Iterator[ComposeStage]:
    """Start the stack; raises CannotPlayError."""
    screen.say(f"Docker answers: everything runs in a compose project of its own, {PROJECT}.")
    ports = Ports.read()
    since = time.time()
    with compose_servers(REPOSITORY, ports, screen, keep=keep) as compose:
        screen.say("To type the commands below yourself, once:")
        screen.typed(f"export COMPOSE_FILE={':'.join((*FILES, RECEIVER))}")
        yield ComposeStage(compose, ports, since, keep=keep)
