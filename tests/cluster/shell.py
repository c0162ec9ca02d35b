"""A shell beside the compose files, where the commands of a page can be played."""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path

from demo.command import run
from demo.ports import Ports
from documents.pages import DOCS, section
from servers.servers import REPOSITORY
from servers.services import environment

FILES = ("docker-compose.yaml", "docker-compose.services.yaml", "docker-compose.cluster.yaml")

_ADDRESSES = "tests/cluster/compose.yaml"


class Shell:
    """Runs commands in a directory with copies of the files, which they may change.

    `docker compose` has a project of its own there; its etcd keeps its whole history, for the
    tests to read.
    """

    def __init__(self, directory: Path, more: Mapping[str, str]) -> None:
        self.project = f"cluster-{secrets.token_hex(3)}"
        self.directory = directory
        for name in (*FILES, _ADDRESSES, ".env"):
            shutil.copy(REPOSITORY / name, directory)
        shutil.copytree(REPOSITORY / "server-config", directory / "server-config")
        self._environment = {
            **environment(),
            **Ports.read(REPOSITORY / ".env").elsewhere().settings(),
            "ETCD_HISTORY": "0",
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": ":".join((*FILES, Path(_ADDRESSES).name)),
            **more,
        }

    def do(self, commands: str, timeout_s: float = 300.0) -> str:
        """Run commands up to the first that fails, and return their output.

        Raises CommandFailedError, CannotPlayError after the time.
        """
        script = f"set -euo pipefail\ncd {shlex.quote(str(self.directory))}\n{commands}"
        return run(["bash", "-c", script], self._environment, timeout_s=timeout_s)


def documented(page: str, heading: str) -> str:
    """Return the commands that a page of docs/ has under a heading of the second level."""
    text = section(DOCS / page, heading)
    found = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"no commands in {page} under {heading!r}"
    return "".join(map(textwrap.dedent, found))
