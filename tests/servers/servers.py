"""RabbitMQ and etcd in containers if Docker answers, or else as child processes.

A test starts, stops, kills, freezes and wipes them in the same way in either case.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servers.containers import Container, prepare_container
from servers.etcd import EtcdClient, Login
from servers.processes import (
    ETCD_ENVIRONMENT,
    RABBITMQ_ENVIRONMENT,
    CommandFailedError,
    ServerProcess,
    ServersUnavailableError,
    ensure_installed,
    etcd_process,
    free_port,
    rabbitmq_process,
    run_tool,
)
from servers.wait import eventually, lasts
from servers.web import fetch_json

REPOSITORY = Path(__file__).resolve().parents[2]

Kind = Literal["docker", "local"]
Runner = Container | ServerProcess
"""What a server runs in. Its data and its ports survive a stop."""

_QUEUES_WRITTEN_S = 1.0


class Server(ABC):
    """One server. `start`, `restart`, `resume` and `heal` return once it answers."""

    name: str
    # A start takes 1 to 5 s, but a broker that recovers its queues on two busy cores takes longer.
    start_timeout_s = 60.0

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.state: Literal["down", "up", "paused"] = "down"

    @abstractmethod
    def probe(self) -> None:
        """Raise AssertionError or OSError if the server does not answer."""

    def launch(self) -> None:
        """Start it without waiting; `wait_ready` waits."""
        self.runner.start()
        self.state = "up"

    def wait_ready(self) -> None:
        """Wait until the server answers; an error has its log as a note."""
        try:
            eventually(self.probe, self.start_timeout_s, also=(OSError,))
        except (AssertionError, OSError) as error:
            error.add_note(f"log of {self.name}:\n{self.runner.output()[-4000:]}")
            raise

    def start(self) -> None:
        """Start it with the data and the ports it had."""
        self.launch()
        self.wait_ready()

    def stop(self) -> None:
        """Stop it in order; its data stays."""
        if self.state == "paused":
            self.runner.resume()
        self.runner.stop()
        self.state = "down"

    def kill(self) -> None:
        """End it with SIGKILL; what has reached its disk stays."""
        self.runner.kill()
        self.state = "down"

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: its connections stay open and nothing answers."""
        self.runner.pause()
        self.state = "paused"

    def resume(self) -> None:
        self.runner.resume()
        self.state = "up"
        self.wait_ready()

    def heal(self) -> None:
        """Start it if a failed test has left it down, resume it if frozen."""
        if self.state == "paused":
            self.resume()
        elif self.state == "down":
            self.start()

    def close(self) -> None:
        self.runner.close()
        self.state = "down"


class RabbitMQ(Server):
    """A broker with the management plugin and the user guest."""

    name = "rabbitmq"
    user = "guest"
    password = "guest"

    def __init__(self, runner: Runner, amqp_port: int, management_port: int) -> None:
        super().__init__(runner)
        self.amqp_port = amqp_port
        self.url = f"amqp://{self.user}:{self.password}@{runner.address}:{amqp_port}/"
        self.management_url = f"http://{runner.address}:{management_port}"

    def probe(self) -> None:
        """Ask for AMQP's greeting, then for the management API with the user's password.

        RabbitMQ opens its listeners last, so a greeting means that its queues are recovered.
        """
        address = self.runner.address, self.amqp_port
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            if connection.recv(1) != b"\x01":
                raise AssertionError("no Connection.Start from the broker")
        self.management("GET", "/api/overview")

    def kill(self) -> None:
        """End it with SIGKILL, at least 1 s after the last declaration of a queue.

        RabbitMQ stores a new quorum queue's name half a second after its declaration. Killed
        earlier, it restarts with the queue but without the messages that it has confirmed (seen
        with 4.0.5 and 4.3.6). This is no fault of the services.
        """
        if self.state == "up":
            lasts(_QUEUES_WRITTEN_S)
        super().kill()

    def management(self, method: str, path: str, body: object = None) -> object:
        """Call the management API; raises OSError. Its message counts are seconds old."""
        login = (self.user, self.password)
        answer: object = fetch_json(method, self.management_url + path, body, login=login)
        return answer

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl (0.4 s of CPU); raises CommandFailedError."""
        return self.runner.run(["rabbitmqctl", "--quiet", *arguments])


class Etcd(Server):
    """One etcd node. `login` is root's if authentication is enabled, else None."""

    name = "etcd"
    max_txn_ops = 1024

    def __init__(self, runner: Runner, port: int) -> None:
        super().__init__(runner)
        self.endpoint = f"{runner.address}:{port}"
        self.login: Login | None = None

    def probe(self) -> None:
        """Do a linearizable read: unlike a connection or /health, it needs a leader."""
        EtcdClient(self.endpoint, 5, lambda: self.login).revision()

    def wipe(self) -> None:
        """Kill it, and start it at the same address without its data."""
        if self.state != "down":
            self.kill()
        self.runner.erase()
        self.login = None
        self.start()

    def save(self) -> None:
        """Take a snapshot of the data for `restore`."""
        snapshot = self.runner.workplace / f"{secrets.token_hex(4)}.db"
        self._saved = snapshot.with_suffix(".restored")
        self.ctl("snapshot", "save", str(snapshot))
        # As in etcd 3.5. From 3.6 on only `etcdutl` restores, which not every 3.5 image has.
        cluster = ["--name=harness", "--initial-cluster=harness=http://localhost:2380"]
        self.ctl("snapshot", "restore", str(snapshot), f"--data-dir={self._saved}", *cluster)

    def restore(self) -> None:
        """Kill it, and start it with the data of the snapshot; once for each `save`."""
        if self.state != "down":
            self.kill()
        self.runner.replace(self._saved)
        self.start()

    def require_login(self) -> None:
        """Enable authentication, with a user root who has all rights."""
        login = Login("root", "root's own")
        self.ctl("user", "add", f"{login.user}:{login.password}")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")
        self.login = login

    def require_no_login(self) -> None:
        """Disable authentication."""
        self.ctl("auth", "disable")
        self.login = None

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl on this node, as root if needed; raises CommandFailedError."""
        login = [f"--user={self.login.user}:{self.login.password}"] if self.login else []
        return self.runner.run(["etcdctl", *login, *arguments])


@dataclass(frozen=True)
class Servers:
    """A broker and an etcd node, and in what they run."""

    kind: Kind
    rabbitmq: RabbitMQ
    etcd: Etcd

    def settings(self) -> dict[str, str]:
        """Return the variables that point a service at these servers."""
        return {
            "RABBITMQ_URL": self.rabbitmq.url,
            "ETCD_ENDPOINTS": self.etcd.endpoint,
            "ETCD_MAX_TXN_OPS": str(self.etcd.max_txn_ops),
        }

    def heal(self) -> None:
        """Start or resume the servers that a failed test has left down or frozen."""
        self.rabbitmq.heal()
        self.etcd.heal()


@contextmanager
def start_servers(*, kind: Kind | None = None) -> Iterator[Servers]:
    """Start both servers, yield them once both answer, and remove them after the block.

    They run in containers if `kind` is None and Docker answers. Raises ServersUnavailableError.
    """
    chosen = kind or ("docker" if docker_available() else "local")
    with ExitStack() as stack:
        rabbitmq = _prepare_rabbitmq(stack, chosen)
        etcd = _prepare_etcd(stack, chosen)
        stack.enter_context(booted(rabbitmq, etcd))
        yield Servers(chosen, rabbitmq, etcd)


@contextmanager
def start_etcd(kind: Kind, *flags: str) -> Iterator[Etcd]:
    """Start another etcd node, and remove it after the block; later `flags` override ours."""
    with ExitStack() as stack:
        etcd = _prepare_etcd(stack, kind, *flags)
        stack.enter_context(booted(etcd))
        yield etcd


@contextmanager
def booted(*servers: Server) -> Iterator[None]:
    """Start servers side by side, and close them after the block."""
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(closing(server))
            server.launch()
        for server in servers:
            server.wait_ready()
        yield


def _prepare_rabbitmq(stack: ExitStack, kind: Kind) -> RabbitMQ:
    amqp_port, management_port = free_port(), free_port()
    runner: Runner
    if kind == "docker":
        ports = {5672: amqp_port, 15672: management_port}
        runner = prepare_container(image("IMAGE_RABBITMQ"), ports, environment=RABBITMQ_ENVIRONMENT)
    else:
        runner = rabbitmq_process(_home(stack), amqp_port, management_port)
    return RabbitMQ(runner, amqp_port, management_port)


def _prepare_etcd(stack: ExitStack, kind: Kind, *more_flags: str) -> Etcd:
    port, data = free_port(), "/etcd-data"
    # As in the compose files, except that etcd never compacts: tests read its whole history.
    flags = [
        "--name=harness",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        f"--max-txn-ops={Etcd.max_txn_ops}",
        f"--quota-backend-bytes={8 << 30}",
        "--snapshot-count=1000",
        "--experimental-snapshot-catchup-entries=500",
        "--auto-compaction-retention=0",
        "--log-level=warn",
        *more_flags,
    ]
    runner: Runner
    if kind == "docker":
        own = [f"--data-dir={data}", "--listen-client-urls=http://0.0.0.0:2379"]
        command = ["/usr/local/bin/etcd", *own, *flags]
        runner = prepare_container(
            image("IMAGE_ETCD"), {2379: port}, command, data, ETCD_ENVIRONMENT
        )
    else:
        runner = etcd_process(_home(stack), port, flags)
    return Etcd(runner, port)


def _home(stack: ExitStack) -> Path:
    ensure_installed()
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="servers-")))


def docker_available() -> bool:
    """Return whether a Docker engine answers."""
    try:
        # If the engine cannot be reached, older clients print an empty version and no error.
        version = run_tool(["docker", "info", "--format={{.ServerVersion}}"], timeout_s=10)
    except CommandFailedError:
        return False
    return bool(version.strip())


def compose_settings() -> dict[str, str]:
    """Return the settings of `.env`, which the shell overrides as with Compose; raises OSError."""
    settings = {}
    for line in (REPOSITORY / ".env").read_text().splitlines():
        name, separator, value = (part.strip() for part in line.partition("="))
        if separator and not name.startswith("#"):
            settings[name] = os.environ.get(name, value.strip("\"'"))
    return settings


def image(variable: str) -> str:
    """Return the image that a variable of `.env` names; raises ServersUnavailableError."""
    try:
        return compose_settings()[variable]
    except (OSError, KeyError) as error:
        raise ServersUnavailableError(f".env does not name an image as {variable}") from error
