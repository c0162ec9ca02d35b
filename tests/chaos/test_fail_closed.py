"""etcd away for long, or another than it was: nothing is settled, and the service says why."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.durations import lasting
from chaos.holding import holds, settling_nothing
from chaos.outages import frozen, killed
from integration.judging import becomes, passes, says, throughout, times_returned
from integration.load import ids, orders
from integration.sink import Sink
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

BATCH = 32
# The library asks the broker for as much again as its four commits in flight hold.
IN_HAND = 2 * 4 * BATCH
MOST_EVENTS = 3000
# A wiped etcd's revisions begin again, so it can look like one that was restored.
ANOTHER = "wiped|restored from an older state"
SEEN_PAST_THE_SNAPSHOT = 50


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", lasting(30, 600))
def test_etcd_is_down_for_long(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    acks: AckAudit,
    broker: Broker,
    statsd: StatsdListener,
    seconds: float,
) -> None:
    """No delivery is burnt: each is given out once, and settled when etcd is back."""
    attempt = trial("etcd down for long")
    service = start_audited("order", BATCH_SIZE=str(BATCH))
    with attempt.load(min(100, MOST_EVENTS / seconds)) as load:
        attempt.works()
        with killed(clean.etcd):
            attempt.publish(orders(2 * IN_HAND, "burst"))
            eventually(partial(holds, service))
            passes(lambda: broker.unacked("order"), IN_HAND - 1)
            with settling_nothing(acks):
                throughout(seconds, lambda: _bounded(broker, service))
            assert broker.unacked("order") == IN_HAND
            attempt.fired()
        assert load.running
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=500)
    received = statsd.count("orders_processed") + statsd.count("orders_processed_skipped")
    becomes(lambda: statsd.count("orders_received"), received)
    assert statsd.count("orders_returned") == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", lasting(30, 600))
def test_etcd_is_frozen_for_long_and_a_replica_is_stopped_meanwhile(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    acks: AckAudit,
    broker: Broker,
    seconds: float,
) -> None:
    """What the stopped one held goes back once; the outage itself costs no delivery anything."""
    attempt = trial("etcd frozen for long")
    running = [start_audited("order", BATCH_SIZE=str(BATCH)) for _ in range(2)]
    attempt.publish(orders(50, "before"))
    # A frozen etcd keeps the audit waiting: it begins when no ack is on its way.
    becomes(lambda: acks.checked, 50)
    with frozen(clean.etcd), attempt.load(min(100, MOST_EVENTS / seconds)) as load:
        attempt.publish(orders(3 * IN_HAND, "burst"))
        becomes(lambda: broker.unacked("order"), 2 * IN_HAND)
        for service in running:
            eventually(partial(holds, service))
        with settling_nothing(acks):
            for service in running:
                throughout(seconds / 2, partial(holds, service))
            assert running[0].terminate(10) == 0
            holds(running[1])
        assert broker.unacked("order") == IN_HAND
        assert times_returned(clean.rabbitmq, "order") == [1] * IN_HAND
        attempt.fired()
        assert load.running
    attempt.recovers()
    attempt.judge(at_least=500)


@pytest.mark.timeout(200)
def test_etcd_is_wiped(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    acks: AckAudit,
    broker: Broker,
    store: Store,
) -> None:
    """Neither what was in hand, nor what comes, nor what the service remembers is acked."""
    attempt = trial("etcd wiped")
    service = start_audited("order")
    # Recorded before, and gone with the data: the attempt judges what comes after.
    known = broker.publish(orders(20, "known"))
    becomes(lambda: store.done("order"), ids(known))
    clean.etcd.kill()
    attempt.publish(orders(30, "held"))
    becomes(lambda: broker.unacked("order"), 30)
    clean.etcd.wipe()
    eventually(partial(holds, service, ANOTHER))
    attempt.fired()
    with settling_nothing(acks):
        attempt.publish([*known, *orders(30, "new")])
        becomes(lambda: broker.unacked("order"), 80)
        throughout(5, partial(holds, service, ANOTHER))
    assert says(service, "not the one seen before")
    assert store.client.get() == []
    assert service.terminate(10) == 0
    assert times_returned(clean.rabbitmq, "order") == [1] * 80
    start_audited("order")
    attempt.recovers()
    attempt.judge(at_least=80, first_revision=1)


@pytest.mark.timeout(200)
def test_etcd_is_wiped_in_mid_call(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    acks: AckAudit,
    store: Store,
    sink: Sink,
) -> None:
    """A call that ends in another etcd's time is not recorded there: it is made again."""
    attempt = trial("etcd wiped", service="notify")
    service = start_audited("notify", NOTIFY_URL=sink.url)
    sink.hold()
    called = attempt.publish(orders(10, "called"))
    becomes(lambda: set(sink.per_key()), ids(called))
    clean.etcd.wipe()
    sink.release()
    eventually(partial(holds, service, ANOTHER))
    attempt.fired()
    with settling_nothing(acks):
        attempt.publish(orders(10, "new"))
        throughout(5, partial(holds, service, ANOTHER))
    assert store.client.get() == []
    assert sink.per_key() == dict.fromkeys(ids(called), 1)
    assert service.terminate(10) == 0
    start_audited("notify", NOTIFY_URL=sink.url)
    attempt.recovers()
    attempt.judge(at_least=20, first_revision=1)
    assert Counter(sink.per_key().values()) == {2: 10, 1: 11}


@pytest.mark.timeout(200)
def test_etcd_is_restored_from_an_older_snapshot(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    acks: AckAudit,
    broker: Broker,
    store: Store,
) -> None:
    """Nothing is acked, not even what the snapshot still holds, until the service is restarted."""
    attempt = trial("etcd restored from an older snapshot")
    service = start_audited("order")
    saved = attempt.publish(orders(20, "saved"))
    becomes(lambda: store.done("order"), ids(saved))
    clean.etcd.save()
    for number in range(SEEN_PAST_THE_SNAPSHOT):
        store.client.put("/elsewhere", str(number).encode())
    # Recorded and acked, and gone with the restoring: for the operator to know, not for us.
    gone = broker.publish(orders(20, "gone"))
    becomes(lambda: store.done("order"), ids(saved + gone))
    before = store.client.revision()
    clean.etcd.restore()
    assert store.client.revision() < before - SEEN_PAST_THE_SNAPSHOT
    eventually(partial(holds, service, "restored from an older state"))
    attempt.fired()
    with settling_nothing(acks):
        attempt.publish([*saved, *orders(30, "new")])
        becomes(lambda: broker.unacked("order"), 50)
        throughout(5, partial(holds, service, "restored from an older state"))
    assert says(service, "not the one seen before")
    assert store.done("order") == ids(saved)
    assert service.terminate(10) == 0
    start_audited("order")
    attempt.recovers()
    attempt.judge(at_least=50)


def _bounded(broker: Broker, service: Service) -> None:
    holds(service)
    assert broker.unacked("order") <= IN_HAND
