"""RabbitMQ and etcd as a test sees them, whatever they run in."""

import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal, Protocol

from servers.login import Login, log_in
from servers.wait import eventually, lasts
from servers.web import fetch_json

_QUEUES_WRITTEN_S = 1.0


class CommandFailedError(Exception):
    """A server's own tool ended with an error; the message is what it said."""


class Runner(Protocol):
    """What a server runs in: child processes or a container. Data and ports outlive a stop."""

    def start(self) -> None:
        """Start the server; returns before it answers."""

    def stop(self) -> None:
        """Stop it in order and wait for its end."""

    def kill(self) -> None:
        """End it with SIGKILL."""

    def pause(self) -> None:
        """Freeze it."""

    def resume(self) -> None:
        """Let it go on."""

    def erase(self) -> None:
        """Forget its data; only while it is down."""

    def run(self, command: Sequence[str]) -> str:
        """Run a tool beside the server, return its output; raises CommandFailedError."""

    @property
    def workplace(self) -> PurePath:
        """Where such a tool can leave files; they are there until the data is erased."""

    def replace(self, made: PurePath) -> None:
        """Put the directory that a tool has made in place of the data; only while it is down."""

    def output(self) -> str:
        """Return the server's log."""

    def close(self) -> None:
        """End it and leave nothing behind."""


class Server(ABC):
    """The life of one server. Everything that starts it returns only when it answers."""

    name: str
    # A broker that recovers on two busy cores takes its time; a healthy start needs 1 to 5 s.
    start_timeout_s = 60.0

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.state: Literal["down", "up", "paused"] = "down"

    @abstractmethod
    def probe(self) -> None:
        """Raise AssertionError or OSError unless the server answers."""

    def launch(self) -> None:
        """Start it without waiting; `wait_ready` belongs to it."""
        self._runner.start()
        self.state = "up"

    def wait_ready(self) -> None:
        """Wait until the server answers; the error after the deadline carries its log."""
        try:
            eventually(self.probe, self.start_timeout_s, also=(OSError,))
        except (AssertionError, OSError) as error:
            error.add_note(f"log of {self.name}:\n{self._runner.output()[-4000:]}")
            raise

    def start(self) -> None:
        """Start it again, with the data and the ports it had."""
        self.launch()
        self.wait_ready()

    def stop(self) -> None:
        """Stop it in order, keeping its data."""
        if self.state == "paused":
            self._runner.resume()
        self._runner.stop()
        self.state = "down"

    def kill(self) -> None:
        """End it with SIGKILL, keeping what had reached its disk."""
        self._runner.kill()
        self.state = "down"

    def restart(self) -> None:
        """Stop it in order and start it again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: its connections stay open and nothing answers."""
        self._runner.pause()
        self.state = "paused"

    def resume(self) -> None:
        """Let a frozen server go on."""
        self._runner.resume()
        self.state = "up"
        self.wait_ready()

    def heal(self) -> None:
        """Undo what a failed test has left: start it if it is down, resume it if it is frozen."""
        if self.state == "paused":
            self.resume()
        elif self.state == "down":
            self.start()

    def logs(self) -> str:
        """Return the server's log."""
        return self._runner.output()

    def close(self) -> None:
        """End it and remove what it has left."""
        self._runner.close()
        self.state = "down"


class RabbitMQ(Server):
    """A broker with the management plugin and the user guest."""

    name = "rabbitmq"
    user = "guest"
    password = "guest"

    def __init__(self, runner: Runner, amqp_port: int, management_port: int) -> None:
        super().__init__(runner)
        self.amqp_port = amqp_port
        self.url = f"amqp://{self.user}:{self.password}@127.0.0.1:{amqp_port}/"
        self.management_url = f"http://127.0.0.1:{management_port}"

    def probe(self) -> None:
        """Ask for AMQP's greeting, then for the management API with the user's password.

        Listeners open last in RabbitMQ's boot: a greeting means that queues are recovered.
        """
        with socket.create_connection(("127.0.0.1", self.amqp_port), timeout=5) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            if connection.recv(1) != b"\x01":
                raise AssertionError("no Connection.Start from the broker")
        self.management("GET", "/api/overview")

    def kill(self) -> None:
        """End it with SIGKILL, keeping what had reached its disk.

        RabbitMQ writes down which quorum queues there are half a second after a declaration.
        Killed before, it starts with the queue but without the messages that it had confirmed (seen
        with 4.0.5 and 4.3.6). That is its fault, not our services', so it is given the time.
        """
        if self.state == "up":
            lasts(_QUEUES_WRITTEN_S)
        super().kill()

    def management(self, method: str, path: str, body: object = None) -> object:
        """Ask the management API; raises OSError. Its message counts are seconds old."""
        login = (self.user, self.password)
        answer: object = fetch_json(method, self.management_url + path, body, login=login)
        return answer

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl (0.4 s of CPU); raises CommandFailedError."""
        return self._runner.run(["rabbitmqctl", "--quiet", *arguments])


ETCD_ENVIRONMENT = {"GOGC": "50"}
"""As in the compose files."""


class Etcd(Server):
    """One etcd node. `login` is root's while it asks for one, and None while it does not."""

    name = "etcd"

    def __init__(self, runner: Runner, port: int, max_txn_ops: int) -> None:
        super().__init__(runner)
        self.endpoint = f"127.0.0.1:{port}"
        self.max_txn_ops = max_txn_ops
        self.login: Login | None = None

    def probe(self) -> None:
        """Do a linearizable read: it needs a leader, a TCP connection or /health may not."""
        url = f"http://{self.endpoint}/v3"
        headers = log_in(url, self.login, 5)
        # "AA==" is the key of one zero byte; that it is absent does not matter.
        fetch_json("POST", f"{url}/kv/range", {"key": "AA=="}, headers=headers, timeout_s=5)

    def wipe(self) -> None:
        """Lose all data: kill it and start it at the same address with an empty directory."""
        if self.state != "down":
            self.kill()
        self._runner.erase()
        self.login = None
        self.start()

    def save(self) -> None:
        """Take a snapshot of the data as it is now, ready to be restored."""
        snapshot = self._runner.workplace / f"{secrets.token_hex(4)}.db"
        self._saved = snapshot.with_suffix(".restored")
        self.ctl("snapshot", "save", str(snapshot))
        # Of etcd 3.5; from 3.6 on `etcdutl` alone restores, which not every image of 3.5 has.
        self.ctl(
            "snapshot",
            "restore",
            str(snapshot),
            f"--data-dir={self._saved}",
            "--name=harness",
            "--initial-cluster=harness=http://localhost:2380",
        )

    def restore(self) -> None:
        """Kill it and start it with the data of the snapshot, once for each snapshot."""
        if self.state != "down":
            self.kill()
        self._runner.replace(self._saved)
        self.start()

    def require_login(self) -> None:
        """Let it ask for a login from now on: the user root is made and has all rights."""
        login = Login("root", "root's own")
        self.ctl("user", "add", f"{login.user}:{login.password}")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")
        self.login = login

    def require_no_login(self) -> None:
        """Let it ask for none any more."""
        self.ctl("auth", "disable")
        self.login = None

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl against this node, as root where needed; raises CommandFailedError."""
        login = [f"--user={self.login.user}:{self.login.password}"] if self.login else []
        return self._runner.run(["etcdctl", *login, *arguments])
