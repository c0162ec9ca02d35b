"""Two of three are down: everything waits, and goes on when they are back."""

from __future__ import annotations

from functools import partial

import pytest

from chaos.holding import holds
from chaos.signs import losses
from cluster.cluster import Cluster
from cluster.conftest import StartTrial
from integration.judging import not_ready, throughout
from integration.load import orders
from servers.broker import Broker
from servers.wait import eventually, stands_still


@pytest.mark.timeout(300)
def test_two_of_three_members_are_stopped(
    trial: StartTrial, cluster: Cluster, broker: Broker
) -> None:
    """The replicas hold what they have, are not ready, and go on when the members are back."""
    attempt = trial("two of three etcd members stopped")
    with attempt.load():
        attempt.works()
        attempt.all_work()
        for member in cluster.members[:2]:
            member.stop()
        for replica in attempt.replicas:
            eventually(partial(holds, replica.service))
    # No publisher is at work from here on, so that each ack would show.
    attempt.publish(orders(300, "meanwhile"))
    before = stands_still(partial(_messages, broker))
    assert before >= 300

    def nothing_is_settled() -> None:
        assert _messages(broker) == before
        for replica in attempt.replicas:
            holds(replica.service)

    throughout(10, nothing_is_settled)
    attempt.fired()
    for member in cluster.members[:2]:
        member.launch()
    cluster.heal()
    attempt.recovers()
    with attempt.load():
        attempt.all_work()
    attempt.judge()
    assert [losses(replica.service) for replica in attempt.replicas] == [0, 0, 0]


@pytest.mark.timeout(300)
def test_two_of_three_brokers_are_stopped(trial: StartTrial, cluster: Cluster) -> None:
    """The third can do nothing alone; what was confirmed is there when they are back."""
    attempt = trial("two of three brokers stopped")
    with attempt.load():
        attempt.works()
        for broker in cluster.brokers[:2]:
            broker.stop()
        for replica in attempt.replicas:
            eventually(partial(not_ready, replica.service, "rabbitmq"), 60)
        recorded = stands_still(attempt.progress.count)  # once what was under way has ended

        def nothing_is_recorded() -> None:
            assert attempt.progress.count() == recorded

        throughout(10, nothing_is_recorded)
        attempt.fired()
        for broker in cluster.brokers[:2]:
            broker.launch()
        cluster.heal()
        attempt.works()
        attempt.recovers()
        attempt.all_work()
    attempt.judge()


def _messages(broker: Broker) -> int:
    """Return how many messages the queue holds, ready or not."""
    return sum(broker.depth("order"))
