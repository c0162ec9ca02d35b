"""The demo's three acts on the whole cluster, as `make up-cluster` starts it."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from cluster.shell import FILES
from demo.acts import play_all
from demo.compose import Compose
from demo.compose_stage import ComposeStage
from demo.play import Play
from demo.ports import Ports
from demo.screen import Screen
from demo.stage import SERVICES
from servers.engine import docker_available
from servers.servers import REPOSITORY
from servers.web import fetch_json

SERVERS = ("rabbitmq", "rabbitmq2", "rabbitmq3", "etcd", "etcd2", "etcd3", "graphite-statsd")
REPLICAS = 3


class ClusterCompose(Compose):
    """`docker compose` with the cluster's files, and three replicas of each service."""

    def __init__(self, project: str, ports: Ports) -> None:
        settings = {"LOG_FORMAT": "console", **ports.settings()}
        super().__init__(REPOSITORY, project, settings, FILES)

    def run(
        self, *arguments: str, timeout_s: float | None = None, show_progress: bool = False
    ) -> str:
        """Run one command; `up` brings all replicas, `exec` runs in each of them."""
        verb, *rest = arguments
        if verb == "up":
            rest = [f"--scale={one}={REPLICAS}" for one in SERVICES if one in rest] + rest
        indices = range(1, REPLICAS + 1) if verb == "exec" else ()
        commands = [(verb, f"--index={index}", *rest) for index in indices] or [(verb, *rest)]
        return "".join(
            super(ClusterCompose, self).run(
                *command, timeout_s=timeout_s, show_progress=show_progress
            )
            for command in commands
        )


@pytest.fixture
def ports() -> Ports:
    """Give free ports for all that is published."""
    return Ports.read(REPOSITORY / ".env").elsewhere()


@pytest.fixture
def graphite_url(ports: Ports) -> str:
    """Give Graphite's address."""
    return f"http://127.0.0.1:{ports.numbers['PORT_GRAPHITE']}"


@pytest.fixture
def stage(ports: Ports) -> Iterator[ComposeStage]:
    """Start the servers, and take it all down in the end."""
    if not docker_available():
        pytest.skip("the cluster needs Docker, which does not answer")
    compose = ClusterCompose(f"cluster-acts-{secrets.token_hex(3)}", ports)
    try:
        since = time.time()
        compose.run("build", *SERVICES)
        compose.run("up", "--detach", "--wait", *SERVERS, timeout_s=240)
        yield ComposeStage(compose, ports, since, keep=False)
    finally:
        compose.down()


@pytest.mark.timeout(600)
def test_the_three_acts(stage: ComposeStage, graphite_url: str) -> None:
    """Each check of the demo passes, and Graphite knows what the guide tells people to watch."""
    play = Play(stage, Screen())
    play_all(play)
    found = {expression: _series(graphite_url, expression) for expression in _expressions()}
    # Nobody has lost a claim, so there is no such counter yet.
    unknown = [expression for expression, series in found.items() if not series]
    assert unknown == [one for one in found if "claim_lost" in one]
    assert len(found) > 5
    assert play.passed == 19


def _expressions() -> list[str]:
    """Return the Graphite expressions of the guide: what stands first in the rows of a table."""
    guide = (REPOSITORY / "docs/cluster.md").read_text()
    return re.findall(r"^\| `(\w+\(.*?\))` \|", guide, re.MULTILINE)


def _series(graphite_url: str, expression: str) -> Any:
    """Return the names of the series that Graphite makes of it; raises OSError for a wrong one."""
    query = urlencode({"target": expression, "from": "-10min", "format": "json"})
    return [one["target"] for one in fetch_json("GET", f"{graphite_url}/render?{query}")]
