"""A cluster of three brokers and three etcd members, from the repository's compose files."""

from __future__ import annotations

import json
import random
import re
import secrets
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from demo.compose import Ports
from documents.pages import DOCS, section
from servers.containers import Container
from servers.processes import CommandFailedError, run_tool
from servers.servers import REPOSITORY, Etcd, RabbitMQ, Servers
from servers.services import environment
from servers.wait import eventually
from servers.web import fetch_json

FILES = ("docker-compose.yaml", "docker-compose.services.yaml", "docker-compose.cluster.yaml")

_ADDRESSES = "tests/cluster/compose.yaml"
_BROKERS = {"rabbitmq": 11, "rabbitmq2": 12, "rabbitmq3": 13}
_MEMBERS = {"etcd": 21, "etcd2": 22, "etcd3": 23}


class BrokerNode(RabbitMQ):
    """One node of the RabbitMQ cluster, known to the others by its host name."""

    def __init__(self, host: str, node: Container) -> None:
        super().__init__(node, 5672, 15672)
        self.host, self.node, self.state = host, node, "up"

    def sees(self) -> set[str]:
        """Return the names of the running nodes that it sees; raises CommandFailedError."""
        status = json.loads(self.ctl("cluster_status", "--formatter", "json"))
        return {name.removeprefix("rabbit@") for name in status["running_nodes"]}


class Status(NamedTuple):
    """A member's id, its leader's id ("0" for none), and the bytes that its data uses."""

    id: str
    leader: str
    used_bytes: int


class Member(Etcd):
    """One member of the etcd cluster."""

    def __init__(self, node: Container) -> None:
        super().__init__(node, 2379)
        self.node, self.state = node, "up"

    def status(self) -> Status:
        """Return the member's own status; raises OSError."""
        url = f"http://{self.endpoint}/v3/maintenance/status"
        found = fetch_json("POST", url, {}, timeout_s=2)
        leader, used_bytes = found.get("leader", "0"), int(found["dbSizeInUse"])
        return Status(found["header"]["member_id"], leader, used_bytes)


class Shell:
    """Runs commands in a directory with copies of the compose files, which they may change.

    `docker compose` has a project of its own there, whose etcd keeps its whole history for the
    tests.
    """

    def __init__(self, directory: Path, more: Mapping[str, str]) -> None:
        self.project = f"cluster-{secrets.token_hex(3)}"
        self.directory = directory
        for name in (*FILES, _ADDRESSES, ".env"):
            shutil.copy(REPOSITORY / name, directory)
        shutil.copytree(REPOSITORY / "server-config", directory / "server-config")
        self._environment = {
            **environment(),
            **Ports.read().elsewhere().settings(),
            "ETCD_HISTORY": "0",
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": ":".join((*FILES, Path(_ADDRESSES).name)),
            **more,
        }

    def do(self, commands: str) -> str:
        """Run commands up to the first failure, and return their output.

        Raises CommandFailedError, also if they take more than five minutes.
        """
        script = f"set -euo pipefail\ncd {shlex.quote(str(self.directory))}\n{commands}"
        return run_tool(["bash", "-c", script], self._environment, timeout_s=300)


@dataclass(frozen=True)
class Cluster(Servers):
    """Both clusters; `rabbitmq` and `etcd` are one node of each, to ask what any node knows."""

    brokers: list[BrokerNode]
    members: list[Member]
    shell: Shell

    def settings(self) -> dict[str, str]:
        """Return the contract's variables, with all nodes."""
        return {
            "RABBITMQ_URL": ",".join(broker.url for broker in self.brokers),
            "ETCD_ENDPOINTS": ",".join(member.endpoint for member in self.members),
            "ETCD_MAX_TXN_OPS": str(self.etcd.max_txn_ops),
        }

    def heal(self) -> None:
        """Start or resume the nodes that a test has left, and wait for the whole cluster."""
        for server in (*self.brokers, *self.members):
            # Launch all before waiting for any: a node alone does not answer.
            if server.state == "down":
                server.launch()
            server.heal()
        eventually(self.whole, 120, also=(OSError,), interval_s=0.5)

    def whole(self) -> None:
        """Raise AssertionError or OSError unless all nodes answer and form one cluster."""
        for broker in self.brokers:
            broker.probe()
        assert self.brokers[0].sees() == set(_BROKERS), "a broker is missing"
        assert len({member.status().leader for member in self.members} - {"0"}) == 1, "no leader"
        for member in self.members:
            member.probe()

    def queue_leader(self, queue: str, without: BrokerNode | None = None) -> BrokerNode:
        """Return the node that leads a queue, by the word of another node than `without`.

        Raises AssertionError while there is none.
        """
        asked = next(broker for broker in self.brokers if broker is not without)
        command = ["rabbitmq-queues", "--quiet", "quorum_status", queue, "--formatter=json"]
        try:
            members = json.loads(asked.runner.run(command))
        except CommandFailedError as error:
            raise AssertionError(f"queue {queue}: {error}") from error
        led_by = {each["Node Name"] for each in members if each["Raft State"] == "leader"}
        leaders = [broker for broker in self.brokers if f"rabbit@{broker.host}" in led_by]
        assert len(leaders) == 1, f"queue {queue}: {members}"
        return leaders[0]

    def etcd_leader(self, without: Member | None = None) -> Member:
        """Return the leader, on which all members but `without` agree.

        Raises AssertionError while there is none, and OSError if a member does not answer.
        """
        answers = {member: member.status() for member in self.members if member is not without}
        leaders = {status.leader for status in answers.values()}
        found = [member for member, status in answers.items() if leaders == {status.id}]
        assert found, f"no leader among them: {answers.values()}"
        return found[0]


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a compose project, yield it once the cluster is whole, and leave nothing behind."""
    # From 198.18.0.0/15, which is reserved for network tests (RFC 2544).
    network = f"198.19.{random.randrange(256)}"
    with tempfile.TemporaryDirectory(prefix="cluster-") as directory:
        shell = Shell(Path(directory), {"CLUSTER_NETWORK": network})

        def node(name: str, last: int) -> Container:
            return Container(f"{shell.project}-{name}-1", f"{network}.{last}")

        try:
            shell.do(f"docker compose up --detach --wait {' '.join((*_BROKERS, *_MEMBERS))}")
            brokers = [BrokerNode(name, node(name, last)) for name, last in _BROKERS.items()]
            members = [Member(node(name, last)) for name, last in _MEMBERS.items()]
            cluster = Cluster("docker", brokers[0], members[0], brokers, members, shell)
            eventually(cluster.whole, 60, also=(OSError,), interval_s=0.5)
            yield cluster
        finally:
            shell.do("docker compose down --volumes --timeout 1")


def documented(page: str, heading: str) -> str:
    """Return the commands in a page of docs/ under a heading of the second level."""
    text = section(DOCS / page, heading)
    found = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"no commands in {page} under {heading!r}"
    return "".join(map(textwrap.dedent, found))
