"""The cluster's servers: a broker and an etcd member as single servers are, and who leads."""

from __future__ import annotations

import json
from typing import NamedTuple

from cluster.node import Node
from servers.server import CommandFailedError, Etcd, RabbitMQ
from servers.web import fetch_json


class BrokerNode(RabbitMQ):
    """One node of the RabbitMQ cluster."""

    def __init__(self, node: Node) -> None:
        super().__init__(node, 5672, 15672)
        self.node = node
        self.url = f"amqp://{self.user}:{self.password}@{node.address}:5672/"
        self.management_url = f"http://{node.address}:15672"

    def probe(self) -> None:
        """Ask the management API: it opens last, and a paused node has closed it."""
        self.management("GET", "/api/overview")

    def sees(self) -> set[str]:
        """Return the names of the nodes that it finds running; raises CommandFailedError."""
        status = json.loads(self.ctl("cluster_status", "--formatter", "json"))
        return {name.removeprefix("rabbit@") for name in status["running_nodes"]}

    def leader(self, queue: str) -> tuple[str, int]:
        """Return which node leads a queue, and how many members it has; raises AssertionError."""
        try:
            answer = self._runner.run(
                ["rabbitmq-queues", "--quiet", "quorum_status", queue, "--formatter=json"]
            )
        except CommandFailedError as error:
            raise AssertionError(f"queue {queue}: {error}") from error
        members = json.loads(answer)
        leaders = [each["Node Name"] for each in members if each["Raft State"] == "leader"]
        if len(leaders) != 1:
            raise AssertionError(f"queue {queue}: {answer}")
        return leaders[0].removeprefix("rabbit@"), len(members)


class Status(NamedTuple):
    """What a member says of itself: its id, its leader's ("0": it has none), and its data."""

    id: str
    leader: str
    used_bytes: int


class Member(Etcd):
    """One member of the etcd cluster."""

    def __init__(self, node: Node) -> None:
        super().__init__(node, 2379, 1024)
        self.node = node
        self.endpoint = f"{node.address}:2379"

    def status(self) -> Status:
        """Return how it is; raises OSError."""
        url = f"http://{self.endpoint}/v3/maintenance/status"
        answer = fetch_json("POST", url, {}, timeout_s=2)
        used_bytes = int(answer["dbSizeInUse"])
        return Status(answer["header"]["member_id"], answer.get("leader", "0"), used_bytes)
