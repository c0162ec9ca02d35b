"""The operator's command as a child process."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from servers.servers import REPOSITORY, Servers
from servers.services import environment


class Ran(NamedTuple):
    """How the command ended."""

    code: int
    out: str
    err: str


class Command:
    """Runs the command on the servers, with only the settings given here."""

    def __init__(self, servers: Servers, settings: Mapping[str, str] = {}) -> None:
        rabbitmq = servers.rabbitmq
        login = f"://{rabbitmq.user}:{rabbitmq.password}@"
        management = {"RABBITMQ_MANAGEMENT_URL": rabbitmq.management_url.replace("://", login)}
        given = {**servers.settings(), **management, "ENABLE_ETCD": "true", **settings}
        self._env = {**environment(), **given}

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "idempotent_consumer", *arguments],
            cwd=REPOSITORY,
            env={**self._env, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, stdin: str = "", **settings: str) -> Ran:
        running = self.start(*arguments, **settings)
        try:
            out, err = running.communicate(stdin, timeout=60)
        finally:
            running.kill()
        assert "Traceback" not in err, err
        return Ran(running.returncode, out, err)

    def json(self, *arguments: str, code: int = 0, **settings: str) -> Any:
        """Run it with --json and return its document; raises AssertionError for another code."""
        ran = self.run(*arguments, "--json", **settings)
        assert ran.code == code, ran
        return json.loads(ran.out)
