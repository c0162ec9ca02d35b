"""Leaders change under load while every node stays: as in an upgrade, or by a nervous election."""

from __future__ import annotations

from functools import partial

import pytest

from cluster.cluster import Cluster
from cluster.conftest import StartTrial
from cluster.servers import BrokerNode
from servers.wait import eventually

pytestmark = pytest.mark.timeout(300)

_MOVES = 20


def test_etcds_leader_moves(trial: StartTrial, cluster: Cluster) -> None:
    """Twenty times, from each member to the next."""
    attempt = trial("etcd's leader moved")
    with attempt.under_load():
        for _ in range(_MOVES):
            leader = eventually(cluster.etcd_leader, also=(OSError,))
            follower = next(one for one in cluster.members if one is not leader)
            leader.ctl("move-leader", f"{int(follower.status().id):x}")
            assert eventually(cluster.etcd_leader, also=(OSError,)) is not leader
            attempt.fired()
            attempt.works(20)
    attempt.judge()


def test_each_broker_is_put_into_maintenance(trial: StartTrial, cluster: Cluster) -> None:
    """As before an upgrade: the node's queues are led elsewhere, and its clients sent away."""
    attempt = trial("each broker put into maintenance")
    with attempt.under_load():
        for broker in cluster.brokers:
            broker.node.run(["rabbitmq-upgrade", "drain"])
            eventually(partial(_leads_nothing, cluster, broker))
            attempt.fired()
            attempt.works()
            broker.node.run(["rabbitmq-upgrade", "revive"])
    attempt.judge()


def _leads_nothing(cluster: Cluster, drained: BrokerNode) -> None:
    assert cluster.queue_leader("order", without=drained) is not drained
