"""The repository's services as child processes."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from servers.ports import free_port
from servers.process import Child
from servers.servers import REPOSITORY
from servers.wait import eventually
from servers.web import fetch_json

# Everything in the contract: none of it reaches a service from the shell that runs the tests.
CONTRACT_VARIABLES = frozenset(
    {
        "BATCH_SIZE",
        "BREAKER_FAILURES",
        "CALLS_AT_ONCE",
        "DEDUP_WINDOW",
        "ENABLE_ETCD",
        "ETCD_CA_CERT",
        "ETCD_CERT",
        "ETCD_ENDPOINTS",
        "ETCD_KEY",
        "ETCD_MAX_TXN_OPS",
        "ETCD_PASSWORD",
        "ETCD_USER",
        "HEALTH_PORT",
        "LOG_FORMAT",
        "LOG_LEVEL",
        "NOTIFY_URL",
        "RABBITMQ_CA_CERT",
        "RABBITMQ_CERT",
        "RABBITMQ_KEY",
        "RABBITMQ_URL",
        "RETRY_DELAYS",
        "STATSD_HOST",
        "STATSD_PORT",
        "STATSD_PREFIX",
    }
)

_DIRECTORIES = {"shipping": "idempotent_consumer/examples"}

# The contract gives a service 10 s; what is over that is the test's to judge, not ours to hide.
_TERMINATE_TIMEOUT_S = 20.0


def environment() -> dict[str, str]:
    """Return the shell's variables, without those that configure services or Compose."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in CONTRACT_VARIABLES and not name.startswith("COMPOSE_")
    }


class ServiceEndedError(Exception):
    """The service has ended although it was waited for; the message ends with its log."""


class Health(NamedTuple):
    """An answer of the health endpoint."""

    status: int
    body: Any


class Service:
    """One service process. Made by `run_service`."""

    def __init__(self, name: str, child: Child, health_port: int) -> None:
        self.name = name
        self._child = child
        self._health_url = f"http://127.0.0.1:{health_port}"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._child.running

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._child.exit_code

    def health(self, path: str = "/readyz") -> Health:
        """Ask the health endpoint; raises OSError when it does not answer."""
        try:
            return Health(200, fetch_json("GET", self._health_url + path, timeout_s=5))
        except HTTPError as error:
            with error:
                return Health(error.code, _json_or_text(error.read()))

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until /readyz answers 200.

        Raises ServiceEndedError as soon as the process is gone, AssertionError or OSError when it
        is not ready in time; all of them with its log.
        """

        def ready() -> None:
            if not self.running:
                raise ServiceEndedError(f"{self.name} ended with exit code {self.exit_code}")
            if (health := self.health()).status != 200:
                raise AssertionError(f"{self.name} is not ready: {health.body}")

        try:
            eventually(ready, timeout_s, also=(OSError,))
        except (ServiceEndedError, AssertionError, OSError) as error:
            error.add_note(f"log of {self.name}:\n{self.logs()[-4000:]}")
            raise

    def wait_end(self, timeout_s: float = 15.0) -> int:
        """Wait until the process ends by itself and return its exit code.

        Raises AssertionError if it is still there.
        """

        def ended() -> int:
            if (code := self.exit_code) is None:
                raise AssertionError(f"{self.name} still runs after {timeout_s:g} s")
            return code

        return eventually(ended, timeout_s)

    def terminate(self, timeout_s: float = _TERMINATE_TIMEOUT_S) -> int:
        """Send SIGTERM and return the exit code; kills it and raises TimeoutError if it stays."""
        return self._child.terminate(timeout_s)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._child.kill()

    def pause(self) -> None:
        """Freeze it with SIGSTOP."""
        self._child.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._child.resume()

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does."""
        self._child.signal(signal.SIGINT)

    def logs(self) -> str:
        """Return everything it has written to stdout and stderr."""
        return self._child.output()


@contextmanager
def run_service(
    name: str,
    settings: Mapping[str, str],
    *,
    log_directory: Path | None = None,
    command: Sequence[str] | None = None,
) -> Iterator[Service]:
    """Run `python -m <name>` in the service's own directory while the block runs.

    `command` takes the place of that, for a service that is started by something else.
    `settings` are variables of the contract (and any other, such as a crash point); they override
    JSON logs and a health endpoint on a free port. Its log lies in `log_directory`, else
    in a temporary one. Does not wait: see `wait_ready`. At the end the process is killed if it
    still runs; a test that cares how it ends calls `terminate`.
    """
    health_port = settings.get("HEALTH_PORT") or str(free_port())
    env = {**environment(), "LOG_FORMAT": "json", **settings, "HEALTH_PORT": health_port}
    with _directory(log_directory) as directory:
        child = Child(
            command or [sys.executable, "-m", name],
            env=env,
            cwd=REPOSITORY / _DIRECTORIES.get(name, name),
            log=directory / f"{name}-{health_port}.log",
        )
        child.start()
        try:
            yield Service(name, child, int(health_port))
        finally:
            if child.running:
                child.kill()


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="service-") as made:
        yield Path(made)


def _json_or_text(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
