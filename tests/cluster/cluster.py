"""A cluster of three brokers and three etcd members, from the repository's own compose files."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.node import Node
from cluster.servers import BrokerNode, Member
from demo.command import run
from harness.ports import free_port
from harness.servers import REPOSITORY, Servers
from harness.services import CONTRACT_VARIABLES
from harness.wait import eventually

FILES = ("docker-compose.yaml", "docker-compose.services.yaml", "docker-compose.cluster.yaml")
_UP_WITHIN_S = 240.0
_BROKERS = {"rabbitmq": 11, "rabbitmq2": 12, "rabbitmq3": 13}
_MEMBERS = {"etcd": 21, "etcd2": 22, "etcd3": 23}


@dataclass(frozen=True)
class Cluster(Servers):
    """Both clusters; `rabbitmq` and `etcd` are a node of each, for what any of them can answer."""

    brokers: list[BrokerNode] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    def settings(self) -> dict[str, str]:
        """Return the contract's variables, with all nodes."""
        return {
            "RABBITMQ_URL": ",".join(broker.url for broker in self.brokers),
            "ETCD_ENDPOINTS": ",".join(member.endpoint for member in self.members),
            "ETCD_MAX_TXN_OPS": str(self.etcd.max_txn_ops),
        }

    def heal(self) -> None:
        """Start and resume what a failed test has left, and wait until everybody sees everybody."""
        for server in (*self.brokers, *self.members):
            server.heal()
        eventually(self.whole, 120, also=(OSError,), interval_s=0.5)

    def whole(self) -> None:
        """Raise AssertionError or OSError unless all nodes work together."""
        for broker in self.brokers:
            broker.probe()
        assert self.brokers[0].sees() == set(_BROKERS), "a broker is missing"
        assert len({member.status()[1] for member in self.members} - {"0"}) == 1, "no one leader"
        for member in self.members:
            member.probe()

    def queue_leader(self, queue: str, without: BrokerNode | None = None) -> BrokerNode:
        """Return the node that leads a queue, as another than `without` says.

        Raises AssertionError while there is none.
        """
        asked = next(broker for broker in self.brokers if broker is not without)
        name, _ = asked.leader(queue)
        return next(broker for broker in self.brokers if broker.node.name == name)

    def etcd_leader(self, without: Member | None = None) -> Member:
        """Return the member that leads, as all others than `without` say.

        Raises AssertionError while there is none, OSError when one does not answer.
        """
        asked = [member for member in self.members if member is not without]
        answers = {member: member.status() for member in asked}
        leaders = {leader for _, leader in answers.values()}
        found = [member for member, (own, _) in answers.items() if leaders == {own}]
        if not found:
            raise AssertionError(f"no leader among them: {answers.values()}")
        return found[0]


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a project of its own, yield it when it is whole, and leave nothing behind."""
    project = f"cluster-{secrets.token_hex(3)}"
    # From 198.18.0.0/15, which is set apart for tests of networks (RFC 2544).
    network = f"198.19.{random.randrange(256)}"
    environment = _environment(network)
    files = [argument for name in (*FILES, "tests/cluster/compose.yaml")
             for argument in ("-f", str(REPOSITORY / name))]
    compose = ["docker", "compose", "-p", project, "--project-directory", str(REPOSITORY), *files]
    try:
        run([*compose, "up", "--detach", "--wait", *_BROKERS, *_MEMBERS], environment,
            timeout_s=_UP_WITHIN_S)

        def node(name: str, last: int) -> Node:
            return Node(f"{project}-{name}-1", name, f"{project}_default", f"{network}.{last}")

        brokers = [BrokerNode(node(name, last)) for name, last in _BROKERS.items()]
        members = [Member(node(name, last)) for name, last in _MEMBERS.items()]
        for server in (*brokers, *members):
            server.state = "up"
        cluster = Cluster("docker", brokers[0], members[0], brokers, members)
        eventually(cluster.whole, 60, also=(OSError,), interval_s=0.5)
        yield cluster
    finally:
        run([*compose, "down", "--volumes", "--timeout", "1"], environment, timeout_s=120)


def _environment(network: str) -> dict[str, str]:
    """Return what the compose files are filled in with; etcd keeps its whole history."""
    inherited = {
        name: value for name, value in os.environ.items()
        if name not in CONTRACT_VARIABLES and not name.startswith("COMPOSE_")
    }
    ports = ("RABBITMQ", "RABBITMQ_UI", "ETCD", "GRAPHITE", "STATSD")
    return {
        **inherited,
        **{f"PORT_{name}": str(free_port()) for name in ports},
        "ETCD_HISTORY": "0",
        "CLUSTER_NETWORK": network,
    }
