"""Nodes are killed, cut off and drained under load: the others suffice, or the service waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

import pika
import pytest
from pika.exceptions import AMQPError

from chaos.checks import becomes, holds, losses, not_ready, passes, throughout, true
from chaos.load import ids, orders
from chaos.outages import killed
from chaos.receiver import Call, Receiver, account
from chaos.rig import Rig
from chaos.trial import RECOVERY_TIMEOUT_S
from cluster.cluster import BrokerNode, Cluster, Member
from cluster.conftest import StartReplicas, StartTrial
from cluster.trial import Replica
from servers.etcd import record_prefix
from servers.wait import eventually, stands_still

pytestmark = [pytest.mark.usefixtures("docker"), pytest.mark.timeout(400)]

FROM_ALL, FROM_PEERS = "cut off from everybody", "cut off from the other nodes"
# Longer than the broker's nodes take to miss one, which net_ticktime bounds.
LASTS_S = {"killed": 0.0, FROM_ALL: 20.0, FROM_PEERS: 20.0}

MOVES = 20
CALLS_PER_S = 20
LEASE_S = 15


@pytest.mark.parametrize("way", ["killed", FROM_ALL, FROM_PEERS])
def test_etcds_leader_is_lost(trial: StartTrial, cluster: Cluster, way: str) -> None:
    """The others elect a new leader, and the replicas ask them.

    If it is cut off from everybody, the calls to it end by their deadline. If it is cut off only
    from the other members, it answers that it has no leader, and the replicas turn to another.
    """
    attempt = trial(f"etcd's leader {way}")
    victim = cluster.etcd_leader()

    def is_missed() -> None:
        cluster.etcd_leader(without=victim)
        if way == FROM_PEERS:
            assert victim.status().leader == "0"

    attempt.survives(lost(victim, cluster.members, way), is_missed, lasts_s=LASTS_S[way])


@pytest.mark.parametrize(
    ("way", "on_it"), [("killed", None), (FROM_ALL, 3), (FROM_PEERS, 3), (FROM_PEERS, 2)]
)
def test_the_queues_leader_is_lost(
    trial: StartTrial, cluster: Cluster, start_replicas: StartReplicas, way: str, on_it: int | None
) -> None:
    """Another node leads the queue, and the consumers move there.

    No connection is closed when the node is cut off, so the replicas that are connected to it
    (``on_it``) have to notice. They still reach a node that is cut off only from the other nodes,
    though it has no majority; a replica on another node goes on.
    """
    replicas = start_replicas()
    victim = cluster.queue_leader("order")
    if on_it is not None:
        connect(replicas, victim, on_it, start_replicas)
    attempt = trial(f"queue's leader {way}, with {on_it or 'any'} of 3 replicas on it", replicas)
    other = next(broker for broker in cluster.brokers if broker is not victim)

    def is_missed() -> None:
        leads_elsewhere(cluster, victim)
        if way == FROM_ALL:
            assert victim.host not in other.sees()
        elif way == FROM_PEERS:
            assert victim.node.dropped() > 0

    attempt.survives(lost(victim, cluster.brokers, way), is_missed, lasts_s=LASTS_S[way])


def lost(
    victim: BrokerNode | Member, peers: Sequence[BrokerNode | Member], way: str
) -> AbstractContextManager[None]:
    """Return the fault as a context manager."""
    if way == "killed":
        return killed(victim)
    if way == FROM_ALL:
        return victim.node.unplugged()
    return victim.node.cut_off(peer.node for peer in peers if peer is not victim)


def leads_elsewhere(cluster: Cluster, victim: BrokerNode) -> None:
    """Raise AssertionError while the other nodes say that this one leads the queue."""
    assert cluster.queue_leader("order", without=victim) is not victim, "it still leads"


def connect(
    replicas: list[Replica], broker: BrokerNode, number: int, start_replicas: StartReplicas
) -> None:
    """Connect the first replicas to a broker, and the others elsewhere.

    A replica chooses its node at random when it starts, so the wrong ones are started again.
    """
    for index in range(len(replicas)):
        while (replicas[index].node() == broker.node.address) != (index < number):
            assert replicas[index].service.terminate(10) == 0
            (replicas[index],) = start_replicas(number=1)


def test_unacked_deliveries_of_a_killed_queues_leader_are_redelivered(
    cluster: Cluster, start_replicas: StartReplicas, rig: Rig
) -> None:
    """Within seconds, though the node stays down."""
    for replica in start_replicas():
        assert replica.service.terminate(10) == 0
    events = orders(10)
    assert len(rig.broker.publish(events)) == 10
    victim = cluster.queue_leader("order")
    holder = pika.BlockingConnection(pika.URLParameters(victim.url))
    messages = holder.channel().consume("order")
    for _ in events:
        next(messages)
    assert rig.broker.unacked("order") == 10
    with killed(victim):
        start_replicas()
        becomes(lambda: rig.store.done("order"), ids(events), RECOVERY_TIMEOUT_S)
    rig.drained("order")
    with suppress(AMQPError):  # Its node was killed; this only closes its sockets.
        holder.close()


def test_etcds_leader_moves(trial: StartTrial, cluster: Cluster) -> None:
    """Twenty times, from each member to the next."""
    attempt = trial("etcd's leader moved")
    with attempt.under_load():
        for _ in range(MOVES):
            leader = eventually(cluster.etcd_leader, also=(OSError,))
            follower = next(one for one in cluster.members if one is not leader)
            leader.ctl("move-leader", f"{int(follower.status().id):x}")
            assert eventually(cluster.etcd_leader, also=(OSError,)) is not leader
            attempt.fired()
            attempt.works(20)


def test_each_broker_is_put_into_maintenance(trial: StartTrial, cluster: Cluster) -> None:
    """As before an upgrade: another node leads its queues, and its clients are disconnected."""
    attempt = trial("each broker put into maintenance")
    with attempt.under_load():
        for broker in cluster.brokers:
            broker.node.run(["rabbitmq-upgrade", "drain"])
            eventually(partial(leads_elsewhere, cluster, broker))
            attempt.fired()
            attempt.works()
            broker.node.run(["rabbitmq-upgrade", "revive"])


def test_two_of_three_members_are_stopped(trial: StartTrial, cluster: Cluster, rig: Rig) -> None:
    """The replicas hold their deliveries, are not ready, and go on when the members are back."""
    attempt = trial("two of three etcd members stopped")
    with attempt.load():
        attempt.works()
        attempt.all_work()
        for member in cluster.members[:2]:
            member.stop()
        for replica in attempt.replicas:
            eventually(partial(holds, replica.service))
    # Nobody publishes from here on, so that any ack would show in the queue.
    attempt.publish(orders(300, "meanwhile"))
    before = stands_still(lambda: sum(rig.broker.depth("order")))
    assert before >= 300

    def nothing_is_settled() -> None:
        assert sum(rig.broker.depth("order")) == before
        for replica in attempt.replicas:
            holds(replica.service)

    throughout(10, nothing_is_settled)
    attempt.fired()
    cluster.heal()
    attempt.probed()
    with attempt.load():
        attempt.all_work()
    attempt.judge()
    assert [losses(replica.service) for replica in attempt.replicas] == [0, 0, 0]


def test_two_of_three_brokers_are_stopped(trial: StartTrial, cluster: Cluster) -> None:
    """The third can do nothing alone; confirmed events are there when the others are back."""
    attempt = trial("two of three brokers stopped")
    with attempt.load():
        attempt.works()
        for broker in cluster.brokers[:2]:
            broker.stop()
        for replica in attempt.replicas:
            eventually(partial(not_ready, replica.service, "rabbitmq"), 60)
        records = partial(attempt.store.client.count, record_prefix("order"))
        recorded = stands_still(records)  # Commits under way have ended.
        throughout(10, lambda: true(records() == recorded))
        attempt.fired()
        cluster.heal()
        attempt.works()
        attempt.probed()
        attempt.all_work()
    attempt.judge()


@pytest.fixture
def replicas(start_replicas: StartReplicas, receiver: Receiver) -> list[Replica]:
    """Start three replicas of notify, which call as r0, r1 and r2."""
    return [
        replica
        for number in range(3)
        for replica in start_replicas("notify", 1, NOTIFY_URL=receiver.url_for(f"r{number}"))
    ]


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_replica_ends_in_its_calls(
    trial: StartTrial, replicas: list[Replica], receiver: Receiver, end: str
) -> None:
    """Once the lease of a killed replica has expired, the others repeat its calls.

    A stopped replica finishes its own. No other call is repeated.
    """
    attempt = trial(f"notify's replica {end} in its calls", replicas)
    service = replicas[0].service
    with attempt.load(CALLS_PER_S):
        attempt.works()
        if end == "killed":
            receiver.hold()
            passes(partial(receiver.number_held, "r0"), 3)
        else:
            passes(lambda: len(receiver.under_way("r0")), 0)
        with attempt.stall_measured():
            if end == "killed":
                service.kill()
            else:
                assert service.terminate(10) == 0
            ended_s = time.monotonic()
            receiver.release()
            attempt.fired()
            attempt.works()
            attempt.probed()
    attempt.replicas.pop(0)
    attempt.judge()

    def was_killed(before: Call, again: Call) -> bool:
        # The receiver may still answer a call of the dead process before it sees the hang-up.
        unheard = not before.answered or (before.ended_s or ended_s) > ended_s
        return before.caller == "r0" and unheard and again.began_s > ended_s

    repeated = account(receiver.calls, attempt.store.done("notify"), was_killed)
    assert bool(repeated) == (end == "killed")
    again = [call for call in receiver.calls if call.key in repeated and call.caller != "r0"]
    took_s = max((call.began_s for call in again), default=ended_s) - ended_s
    print(f"{len(repeated)} calls were made again, the last one {took_s:.1f} s after the end")
    assert took_s < LEASE_S + 5


def test_etcds_leader_is_killed_under_calls(
    trial: StartTrial, cluster: Cluster, replicas: list[Replica], receiver: Receiver
) -> None:
    """The claims outlast it: no call is repeated."""
    attempt = trial("etcd's leader killed under notify's calls", replicas)
    victim = cluster.etcd_leader()
    elsewhere = partial(cluster.etcd_leader, without=victim)
    attempt.survives(killed(victim), elsewhere, rate_per_s=CALLS_PER_S)
    assert not account(receiver.calls, attempt.store.done("notify"), lambda *_: False)
