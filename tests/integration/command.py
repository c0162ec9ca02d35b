"""The operator's command as a child process."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from servers.servers import REPOSITORY, Servers
from servers.services import environment

_COMMAND = [sys.executable, "-m", "idempotent_consumer"]


class Ran(NamedTuple):
    """How the command ended."""

    code: int
    out: str
    err: str


class Command:
    """Runs the command against the servers, with the settings given and no others."""

    def __init__(self, servers: Servers, settings: Mapping[str, str] = {}) -> None:
        rabbitmq = servers.rabbitmq
        management = rabbitmq.management_url.replace(
            "://", f"://{rabbitmq.user}:{rabbitmq.password}@"
        )
        self._env = {
            **environment(),
            **servers.settings(),
            "RABBITMQ_MANAGEMENT_URL": management,
            "ENABLE_ETCD": "true",
            **settings,
        }

    def run(self, *arguments: str, stdin: str = "", **settings: str) -> Ran:
        """Run it to its end."""
        ended = subprocess.run(
            [*_COMMAND, *arguments],
            cwd=REPOSITORY,
            env={**self._env, **settings},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in ended.stderr, ended
        return Ran(ended.returncode, ended.stdout, ended.stderr)

    def json(self, *arguments: str, code: int = 0, **settings: str) -> Any:
        """Run it with --json, and return its document; raises AssertionError for another code."""
        ran = self.run(*arguments, "--json", **settings)
        assert ran.code == code, ran
        return json.loads(ran.out)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start it with a pipe as its input."""
        return subprocess.Popen(
            [*_COMMAND, *arguments],
            cwd=REPOSITORY,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
