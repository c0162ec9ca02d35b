"""The formulas of the sizing guide hold, each at two points. `-rP` shows what was measured."""

from __future__ import annotations

import sys
import uuid

import pytest

from chaos.checks import becomes
from chaos.load import order, orders
from chaos.receiver import Receiver
from chaos.rig import Rig
from cluster.cluster import Cluster
from cluster.conftest import StartReplicas

pytestmark = [pytest.mark.usefixtures("docker"), pytest.mark.timeout(300)]

BATCH_SIZE = 512
SMALL_BATCH = 8
CALLS_OF_A_REPLICA = 16
RECORD_BYTES = 299
"""By docs/sizing.md, for a service with a name of five letters."""


def test_etcds_data(cluster: Cluster, start_replicas: StartReplicas, rig: Rig) -> None:
    """A record takes as much space in each member as in a single etcd."""
    at_first = [member.status().used_bytes for member in cluster.members]
    replicas = start_replicas(
        number=2,
        BATCH_SIZE=str(BATCH_SIZE),
        command=[sys.executable, "-m", "benchmarks.programs", "bare", "order", "orders"],
    )
    recorded = 0
    for more in (20_000, 40_000):
        rig.broker.publish(order(str(uuid.uuid4())) for _ in range(more))
        recorded += more
        rig.drained("order")
        becomes(lambda: sum(replica.settled() for replica in replicas), recorded)
        used = [
            member.status().used_bytes - before
            for member, before in zip(cluster.members, at_first, strict=True)
        ]
        formula = recorded * RECORD_BYTES
        print(f"bytes of a member with {recorded:,} records: {formula:,}, measured {max(used):,}")
        assert all(abs(bytes_ - formula) < 0.1 * formula for bytes_ in used), used


@pytest.mark.parametrize("number", [1, 3])
def test_deliveries_in_flight_while_etcd_is_down(
    cluster: Cluster, start_replicas: StartReplicas, rig: Rig, number: int
) -> None:
    """They are bounded, and the queue keeps the rest."""
    in_flight = number * 8 * BATCH_SIZE
    start_replicas(number=number, BATCH_SIZE=str(BATCH_SIZE))
    for member in cluster.members:
        member.stop()
    rig.broker.publish(orders(in_flight + 1000))
    becomes(lambda: rig.broker.depth("order"), (1000, in_flight))
    unacked = rig.broker.unacked("order")
    print(f"deliveries in flight, {number} x {BATCH_SIZE}: {in_flight:,}, measured {unacked:,}")
    cluster.heal()
    rig.drained("order")


@pytest.mark.parametrize("number", [1, 3])
def test_calls_at_once(
    start_replicas: StartReplicas, receiver: Receiver, rig: Rig, number: int
) -> None:
    """Each replica makes this many, and claims no more; the other events wait."""
    at_once, in_flight = number * CALLS_OF_A_REPLICA, number * 8 * SMALL_BATCH

    def claims() -> int:
        return len(rig.store.in_state("notify", "claimed"))

    def calls() -> int:
        return len(receiver.under_way("all"))

    start_replicas(
        "notify",
        number,
        NOTIFY_URL=receiver.url_for("all"),
        BATCH_SIZE=str(SMALL_BATCH),
        CALLS_AT_ONCE=str(CALLS_OF_A_REPLICA),
    )
    receiver.hold()
    rig.broker.publish(orders(in_flight + 100))
    becomes(claims, at_once)
    becomes(calls, at_once)
    print(f"claims, {number} x {SMALL_BATCH}: {at_once}, measured {claims()}")
    print(f"calls at once, {number} x {SMALL_BATCH}: {at_once}, measured {calls()}")
    receiver.release()
    rig.drained("notify")
