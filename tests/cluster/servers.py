"""The cluster's servers: a broker and an etcd member as single servers are, and who leads."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from cluster.node import Node
from harness.server import CommandFailedError, Etcd, RabbitMQ
from harness.web import fetch_json

# The queue's metadata names its leader; asking that one for the members shows that it leads.
_LEADER_QUERY = (
    'case rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"%s">>)) of '
    "{ok, Queue} -> "
    "case ra:members(amqqueue:get_pid(Queue), 2000) of "
    "{ok, Members, {_, Leader}} -> {Leader, length(Members)}; Other -> Other end; "
    "NotFound -> NotFound end."
)


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
            answer = self.ctl("eval", _LEADER_QUERY % queue).strip()
        except CommandFailedError as error:
            raise AssertionError(f"queue {queue}: {error}") from error
        found = re.fullmatch(r"\{'?rabbit@([a-z0-9]+)'?,(\d+)\}", answer)
        if found is None:
            raise AssertionError(f"queue {queue}: {answer}")
        return found[1], int(found[2])


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
