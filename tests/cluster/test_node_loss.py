"""One node is lost under load, in each way that a node can be: the others are enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pika
import pytest
from pika.exceptions import AMQPError

from chaos.outages import killed
from cluster.cluster import Cluster
from cluster.conftest import StartTrial
from cluster.replicas import Replica, StartReplicas
from cluster.servers import BrokerNode
from cluster.trial import RECOVERS_WITHIN_S
from integration.judging import becomes, wait_drained
from integration.load import ids, orders
from servers.broker import Broker
from servers.store import Store
from servers.wait import eventually, lasts

pytestmark = pytest.mark.timeout(400)

# Longer than it takes the broker's nodes to find one missing, which net_ticktime bounds.
CUT_FOR_S = 20.0


def test_the_queues_leader_is_killed(trial: StartTrial, cluster: Cluster) -> None:
    """Another node leads the queue, and consumers of the dead one go to the others."""
    attempt = trial("queue's leader killed")
    victim = cluster.queue_leader("order")
    attempt.survives(killed(victim), partial(_leads_elsewhere, cluster, victim))


def test_etcds_leader_is_killed(trial: StartTrial, cluster: Cluster) -> None:
    """The others elect one, and the replicas ask them."""
    attempt = trial("etcd's leader killed")
    victim = cluster.etcd_leader()
    attempt.survives(killed(victim), partial(cluster.etcd_leader, without=victim))


def test_the_queues_leader_is_cut_off_from_everybody(
    trial: StartTrial, cluster: Cluster, start_replicas: StartReplicas
) -> None:
    """Every replica is on it, and no connection is closed: they notice by themselves."""
    replicas, victim = _start_all_on_the_leader(cluster, start_replicas)
    attempt = trial("queue's leader, with all replicas, cut off from everybody", replicas)
    other = next(broker for broker in cluster.brokers if broker is not victim)

    def is_missed() -> None:
        _leads_elsewhere(cluster, victim)
        assert victim.node.name not in other.sees()

    attempt.survives(victim.node.unplugged(), is_missed, lasts_s=CUT_FOR_S)


def test_etcds_leader_is_cut_off_from_everybody(trial: StartTrial, cluster: Cluster) -> None:
    """Its calls under way end by their deadline, and so do those of who waits for it."""
    attempt = trial("etcd's leader cut off from everybody")
    victim = cluster.etcd_leader()
    elsewhere = partial(cluster.etcd_leader, without=victim)
    attempt.survives(victim.node.unplugged(), elsewhere, lasts_s=CUT_FOR_S)


def test_the_queues_leader_is_cut_off_from_the_other_nodes(
    trial: StartTrial, cluster: Cluster, start_replicas: StartReplicas
) -> None:
    """Every replica is on it and still reaches it, until it answers nothing that takes all."""
    replicas, victim = _start_all_on_the_leader(cluster, start_replicas)
    attempt = trial("queue's leader, with all replicas, cut off from the other brokers", replicas)
    with attempt.under_load(), _cut_off_from_the_others(cluster, victim):
        lasts(CUT_FOR_S)
        attempt.fired()
        attempt.works()
    attempt.judge()


def test_the_queues_leader_is_cut_off_with_some_of_the_replicas(
    trial: StartTrial, cluster: Cluster, start_replicas: StartReplicas
) -> None:
    """One of them is elsewhere, and goes on."""
    replicas, victim = _start_all_on_the_leader(cluster, start_replicas)
    stray = replicas.pop()
    while _is_on(victim, stray):
        assert stray.service.terminate(10) == 0
        (stray,) = start_replicas(number=1)
    attempt = trial(
        "queue's leader, with two of three replicas, cut off from the other brokers",
        [*replicas, stray],
    )
    with attempt.under_load(), _cut_off_from_the_others(cluster, victim):
        lasts(CUT_FOR_S)
        attempt.fired()
        attempt.works()
    attempt.judge()


def test_etcds_leader_is_cut_off_from_the_other_nodes(trial: StartTrial, cluster: Cluster) -> None:
    """It answers, and has no leader any more: it is left for one that has."""
    attempt = trial("etcd's leader cut off from the other members")
    victim = cluster.etcd_leader()

    def is_missed() -> None:
        cluster.etcd_leader(without=victim)
        assert victim.status().leader == "0"

    cut_off = victim.node.cut_off(other.node for other in cluster.members if other is not victim)
    attempt.survives(cut_off, is_missed, lasts_s=CUT_FOR_S)


def test_what_clients_of_the_queues_leader_held_when_it_was_killed_comes_again(
    cluster: Cluster, start_replicas: StartReplicas, broker: Broker, store: Store
) -> None:
    """Within seconds, though the node stays away."""
    for replica in start_replicas():
        assert replica.service.terminate(10) == 0
    events = orders(10)
    assert len(broker.publish(events)) == 10
    victim = cluster.queue_leader("order")
    holder = pika.BlockingConnection(pika.URLParameters(victim.url))
    messages = holder.channel().consume("order")
    for _ in events:
        next(messages)
    assert broker.unacked("order") == 10
    with killed(victim):
        start_replicas()
        becomes(lambda: store.done("order"), ids(events), RECOVERS_WITHIN_S)
    wait_drained(broker, "order")
    with suppress(AMQPError):  # Its node was killed: this only gives its sockets back.
        holder.close()


@contextmanager
def _cut_off_from_the_others(cluster: Cluster, victim: BrokerNode) -> Iterator[None]:
    """Cut a broker off from the others, which clients of it do not notice."""
    with victim.node.cut_off(other.node for other in cluster.brokers if other is not victim):
        eventually(partial(_leads_elsewhere, cluster, victim))
        assert victim.node.dropped() > 0
        yield


def _leads_elsewhere(cluster: Cluster, victim: BrokerNode) -> None:
    assert cluster.queue_leader("order", without=victim) is not victim, "it still leads"


def _start_all_on_the_leader(
    cluster: Cluster, start_replicas: StartReplicas
) -> tuple[list[Replica], BrokerNode]:
    """Return three replicas that are connected to the node that leads their queue, and that node.

    Each chooses a node at random when it starts, so those that chose another start again.
    """
    replicas = start_replicas()
    leader = cluster.queue_leader("order")
    while strays := [one for one in replicas if not _is_on(leader, one)]:
        for stray in strays:
            assert stray.service.terminate(10) == 0
            replicas.remove(stray)
        replicas += start_replicas(number=len(strays))
    return replicas, leader


def _is_on(broker: BrokerNode, replica: Replica) -> bool:
    return replica.node() == broker.node.address
