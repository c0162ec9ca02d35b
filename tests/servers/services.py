"""The repository's services as child processes."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from idempotent_consumer.settings import _VARIABLES
from servers.processes import Child, free_port
from servers.servers import REPOSITORY
from servers.wait import eventually
from servers.web import fetch_json

_DIRECTORIES = {"shipment": "idempotent_consumer/examples"}


def environment() -> dict[str, str]:
    """Return this process's variables without those that configure services or Compose."""
    settings = {*_VARIABLES, "NOTIFY_URL"}
    ours = {name for name in os.environ if name in settings or name.startswith("COMPOSE_")}
    return {name: value for name, value in os.environ.items() if name not in ours}


class ServiceEndedError(Exception):
    """A service has ended before it was ready; a note has its log."""


class Health(NamedTuple):
    """An answer of the health endpoint."""

    status: int
    body: Any


def ask_health(url: str, timeout_s: float = 5.0) -> Health:
    """Ask a health endpoint; raises OSError when it does not answer."""
    try:
        return Health(200, fetch_json("GET", url, timeout_s=timeout_s))
    except HTTPError as error:
        with error:
            body = error.read()
        try:
            return Health(error.code, json.loads(body))
        except ValueError:
            return Health(error.code, body.decode(errors="replace"))


class Service(Child):
    """One service process. Made by `run_service`."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], directory: Path
    ) -> None:
        self.name, port = name, env["HEALTH_PORT"]
        self._health_url = f"http://127.0.0.1:{port}"
        super().__init__(
            command,
            env=env,
            cwd=REPOSITORY / _DIRECTORIES.get(name, name),
            log=directory / f"{name}-{port}.log",
        )

    def health(self, path: str = "/readyz") -> Health:
        """Ask the health endpoint; raises OSError when it does not answer."""
        return ask_health(self._health_url + path)

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until /readyz answers 200.

        Raises ServiceEndedError as soon as the process has ended, and AssertionError or OSError
        if it is not ready in time. Each has the service's log as a note.
        """

        def ready() -> None:
            if not self.running:
                raise ServiceEndedError(f"{self.name} ended with exit code {self.exit_code}")
            if (health := self.health()).status != 200:
                raise AssertionError(f"{self.name} is not ready: {health.body}")

        try:
            eventually(ready, timeout_s, also=(OSError,))
        except (ServiceEndedError, AssertionError, OSError) as error:
            error.add_note(f"log of {self.name}:\n{self.output()[-4000:]}")
            raise

    def wait_end(self, timeout_s: float = 30.0) -> int:
        """Wait until the process ends by itself; returns its exit code, raises AssertionError."""

        def ended() -> int:
            code = self.exit_code
            assert code is not None, f"{self.name} still runs"
            return code

        return eventually(ended, timeout_s)


@contextmanager
def run_service(
    name: str,
    settings: Mapping[str, str],
    *,
    log_directory: Path | None = None,
    command: Sequence[str] = (),
) -> Iterator[Service]:
    """Run `python -m <name>`, or a `command`, in the service's directory during the block.

    `settings` are environment variables; they override JSON logs and a health endpoint on a free
    port. The log is in `log_directory`, or in a temporary one. This does not wait for the service
    (see `wait_ready`). After the block the process is killed if it still runs.
    """
    env = {
        **environment(),
        "LOG_FORMAT": "json",
        "HEALTH_PORT": str(free_port()),
        **settings,
    }
    with tempfile.TemporaryDirectory(prefix="service-") as temporary:
        directory = log_directory or Path(temporary)
        service = Service(name, command or [sys.executable, "-m", name], env, directory)
        service.start()
        try:
            yield service
        finally:
            if service.running:
                service.kill()
