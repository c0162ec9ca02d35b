"""One node is lost under load, in each way that a node can be: the others are enough."""

from __future__ import annotations

from functools import partial

import pytest

from chaos.signs import true
from cluster.cluster import Cluster
from cluster.conftest import StartTrial
from cluster.replicas import Replica, StartReplicas
from cluster.servers import BrokerNode, Member
from harness.wait import eventually
from integration.judging import throughout

pytestmark = pytest.mark.timeout(400)

# Longer than it takes the broker's nodes to find one missing, which net_ticktime bounds.
CUT_FOR_S = 20.0


def test_the_queues_leader_is_killed(trial: StartTrial, cluster: Cluster) -> None:
    """Another node leads the queue, and consumers of the dead one go to the others."""
    attempt = trial("queue's leader killed")
    victim = cluster.queue_leader("order")
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            victim.kill()
            eventually(partial(_leads_elsewhere, cluster, victim))
            attempt.fired()
            attempt.works()
            victim.start()
            cluster.heal()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=300)


def test_etcds_leader_is_killed(trial: StartTrial, cluster: Cluster) -> None:
    """The others elect one, and the replicas ask them."""
    attempt = trial("etcd's leader killed")
    victim = cluster.etcd_leader()
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            victim.kill()
            eventually(partial(cluster.etcd_leader, without=victim), also=(OSError,))
            attempt.fired()
            attempt.works()
            victim.start()
            cluster.heal()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=300)


def test_every_node_is_restarted_in_turn(trial: StartTrial, cluster: Cluster) -> None:
    """As for an upgrade: the next one once the last one is back."""
    attempt = trial("every node restarted in turn")
    servers: list[BrokerNode | Member] = [*cluster.brokers, *cluster.members]
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            for server in servers:
                server.restart()
                attempt.fired()
                cluster.heal()
                attempt.works()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=1000)


def test_the_queues_leader_is_cut_off_from_everybody(trial: StartTrial, cluster: Cluster) -> None:
    """No connection of its is closed: the replicas on it notice by themselves."""
    attempt = trial("queue's leader cut off from everybody")
    victim = cluster.queue_leader("order")
    other = next(broker for broker in cluster.brokers if broker is not victim)
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            victim.node.unplug()
            eventually(partial(_leads_elsewhere, cluster, victim))
            throughout(CUT_FOR_S, lambda: None)
            assert victim.node.name not in other.sees()
            attempt.fired()
            attempt.works()
            victim.node.plug_in()
            cluster.heal()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=300)


def test_etcds_leader_is_cut_off_from_everybody(trial: StartTrial, cluster: Cluster) -> None:
    """Its calls under way end by their deadline, and so do those of who waits for it."""
    attempt = trial("etcd's leader cut off from everybody")
    victim = cluster.etcd_leader()
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            victim.node.unplug()
            eventually(partial(cluster.etcd_leader, without=victim), also=(OSError,))
            attempt.fired()
            throughout(CUT_FOR_S, lambda: None)
            attempt.works()
            victim.node.plug_in()
            cluster.heal()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=300)


def test_the_queues_leader_is_cut_off_from_the_other_nodes(
    trial: StartTrial, cluster: Cluster, start_replicas: StartReplicas
) -> None:
    """Its clients still reach it, until it finds itself in the minority and pauses."""
    attempt = trial("queue's leader cut off from the other brokers")
    victim = cluster.queue_leader("order")
    while _all_on(victim, attempt.replicas):
        attempt.replicas += start_replicas(number=1)
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            victim.node.cut_from(broker.node for broker in cluster.brokers if broker is not victim)
            eventually(partial(_leads_elsewhere, cluster, victim))
            throughout(CUT_FOR_S, lambda: None)
            assert victim.node.dropped() > 0
            attempt.fired()
            attempt.works()
            victim.node.mend()
            cluster.heal()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=300)


def test_etcds_leader_is_cut_off_from_the_other_nodes(trial: StartTrial, cluster: Cluster) -> None:
    """It answers, and has no leader any more: it is left for one that has."""
    attempt = trial("etcd's leader cut off from the other members")
    victim = cluster.etcd_leader()
    with attempt.load():
        attempt.works()
        with attempt.stall_measured():
            victim.node.cut_from(member.node for member in cluster.members if member is not victim)
            eventually(partial(cluster.etcd_leader, without=victim), also=(OSError,))
            eventually(lambda: true(victim.status()[1] == "0"), also=(OSError,))
            attempt.fired()
            throughout(CUT_FOR_S, lambda: None)
            attempt.works()
            victim.node.mend()
            cluster.heal()
            attempt.recovers()
        attempt.all_work()
    attempt.judge(at_least=300)


def _leads_elsewhere(cluster: Cluster, victim: BrokerNode) -> None:
    assert cluster.queue_leader("order", without=victim) is not victim, "it still leads"


def _all_on(broker: BrokerNode, replicas: list[Replica]) -> bool:
    return {replica.node() for replica in replicas} == {broker.node.address}
