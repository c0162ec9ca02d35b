"""A cluster of three brokers and three etcd members, from the repository's own compose files."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.node import Node
from cluster.servers import BrokerNode, Member
from cluster.shell import Shell
from servers.servers import Servers
from servers.wait import eventually

_BROKERS = {"rabbitmq": 11, "rabbitmq2": 12, "rabbitmq3": 13}
_MEMBERS = {"etcd": 21, "etcd2": 22, "etcd3": 23}


@dataclass(frozen=True)
class Cluster(Servers):
    """Both clusters; `rabbitmq` and `etcd` are a node of each, for what any of them can answer."""

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
        """Start and resume what a failed test has left, and wait until everybody sees everybody."""
        for server in (*self.brokers, *self.members):
            server.heal()
        eventually(self.whole, 120, also=(OSError,), interval_s=0.5)

    def whole(self) -> None:
        """Raise AssertionError or OSError unless all nodes work together."""
        for broker in self.brokers:
            broker.probe()
        assert self.brokers[0].sees() == set(_BROKERS), "a broker is missing"
        assert len({member.status().leader for member in self.members} - {"0"}) == 1, "no leader"
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
        leaders = {status.leader for status in answers.values()}
        found = [member for member, status in answers.items() if leaders == {status.id}]
        if not found:
            raise AssertionError(f"no leader among them: {answers.values()}")
        return found[0]


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a project of its own, yield it when it is whole, and leave nothing behind."""
    # From 198.18.0.0/15, which is set apart for tests of networks (RFC 2544).
    network = f"198.19.{random.randrange(256)}"
    with tempfile.TemporaryDirectory(prefix="cluster-") as directory:
        shell = Shell(Path(directory), {"CLUSTER_NETWORK": network})

        def node(name: str, last: int) -> Node:
            return Node(shell.project, name, f"{network}.{last}")

        try:
            shell.do(f"docker compose up --detach --wait {' '.join((*_BROKERS, *_MEMBERS))}")
            brokers = [BrokerNode(node(name, last)) for name, last in _BROKERS.items()]
            members = [Member(node(name, last)) for name, last in _MEMBERS.items()]
            for server in (*brokers, *members):
                server.state = "up"
            cluster = Cluster("docker", brokers[0], members[0], brokers, members, shell)
            eventually(cluster.whole, 60, also=(OSError,), interval_s=0.5)
            yield cluster
        finally:
            shell.do("docker compose down --volumes --timeout 1")
