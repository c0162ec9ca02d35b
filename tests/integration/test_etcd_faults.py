"""etcd stops, freezes, loses its data or is another than it was: deliveries are held."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from chaos.checks import (
    becomes,
    holds,
    losses,
    not_ready,
    passes,
    says,
    throughout,
    times_returned,
)
from chaos.durations import lasting, quick, rate
from chaos.load import ids, orders
from chaos.outages import Outage, frozen, killed, stopped
from chaos.receiver import Receiver
from chaos.trial import StartTrial, Trial
from servers.services import Service
from servers.wait import eventually

pytestmark = pytest.mark.short

BATCH = 32
# The library asks the broker for as much again as its four commits in flight hold.
IN_FLIGHT_AT_MOST = 2 * 4 * BATCH
MOST_EVENTS = 3000
# A wiped etcd's revisions begin again, so it can look like one that was restored.
ANOTHER = "wiped|restored from an older state"
SEEN_PAST_THE_SNAPSHOT = 50


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("down", "seconds"),
    [
        quick(stopped, 1),
        (killed, 1),
        (frozen, 3),
        quick(frozen, 10),
        *((frozen, seconds) for seconds in lasting(10, 120)[1:]),
    ],
)
def test_etcd_is_away_for_a_while(trial: StartTrial, down: Outage, seconds: float) -> None:
    """What is in flight stays bounded, and every delivery comes once: none goes back."""
    attempt = trial(f"etcd {down.__name__} for {seconds:g} s")
    broker = attempt.broker
    service = attempt.start(BATCH_SIZE=str(BATCH))
    # A call is given 5 s before it has failed.
    noticed = down is not frozen or seconds > 5

    def held() -> None:
        assert broker.unacked("order") <= IN_FLIGHT_AT_MOST

    def held_to_the_last() -> None:
        not_ready(service, "etcd")
        assert broker.unacked("order") == IN_FLIGHT_AT_MOST

    with attempt.load(rate(seconds + 10)) as load:
        attempt.works()
        with down(attempt.servers.etcd):
            until_s = time.monotonic() + seconds
            passes(lambda: broker.unacked("order"), BATCH)
            if seconds > 5:
                becomes(lambda: broker.unacked("order"), IN_FLIGHT_AT_MOST)
                eventually(lambda: not_ready(service, "etcd"))
            left_s = until_s - time.monotonic()
            throughout(left_s, held_to_the_last if seconds > 5 else held)
            if noticed:
                eventually(lambda: not_ready(service, "etcd"))
            assert load.running
            attempt.fired()
        service.wait_ready(10)
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=100)
    if noticed:
        assert says(service, "etcd answers again")
    attempt.rig.each_delivered_once("orders", attempt.sent)
    assert losses(service) == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", lasting(30, 600))
def test_etcd_is_down_for_long(trial: StartTrial, seconds: float) -> None:
    """No delivery is burnt: each is given out once, and settled when etcd is back."""
    attempt = trial("etcd down for long")
    broker, statsd = attempt.broker, attempt.statsd
    service = attempt.start(BATCH_SIZE=str(BATCH))

    def bounded() -> None:
        holds(service)
        assert broker.unacked("order") <= IN_FLIGHT_AT_MOST

    with attempt.load(min(100, MOST_EVENTS / seconds)) as load:
        attempt.works()
        with killed(attempt.servers.etcd):
            attempt.publish(orders(2 * IN_FLIGHT_AT_MOST, "burst"))
            eventually(partial(holds, service))
            passes(lambda: broker.unacked("order"), IN_FLIGHT_AT_MOST - 1)
            with attempt.acks.none_pass():
                throughout(seconds, bounded)
            assert broker.unacked("order") == IN_FLIGHT_AT_MOST
            attempt.fired()
        assert load.running
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=500)
    attempt.rig.each_delivered_once("orders", attempt.sent)
    assert statsd.count("orders_returned") == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", lasting(30, 600))
def test_etcd_is_frozen_for_long_and_a_replica_is_stopped_meanwhile(
    trial: StartTrial, seconds: float
) -> None:
    """What the stopped one held goes back once; the outage itself costs no delivery anything."""
    attempt = trial("etcd frozen for long")
    broker, acks = attempt.broker, attempt.acks
    running = [attempt.start(BATCH_SIZE=str(BATCH)) for _ in range(2)]
    attempt.publish(orders(50, "before"))
    # A frozen etcd keeps the audit waiting: it begins when no ack is on its way.
    becomes(lambda: acks.checked, 50)
    load = attempt.load(min(100, MOST_EVENTS / seconds))
    with frozen(attempt.servers.etcd), load as publishing:
        attempt.publish(orders(3 * IN_FLIGHT_AT_MOST, "burst"))
        becomes(lambda: broker.unacked("order"), 2 * IN_FLIGHT_AT_MOST)
        for service in running:
            eventually(partial(holds, service))
        with acks.none_pass():
            for service in running:
                throughout(seconds / 2, partial(holds, service))
            assert running[0].terminate(10) == 0
            holds(running[1])
        assert broker.unacked("order") == IN_FLIGHT_AT_MOST
        assert times_returned(attempt.servers.rabbitmq, "order") == [1] * IN_FLIGHT_AT_MOST
        attempt.fired()
        assert publishing.running
    attempt.recovers()
    attempt.judge(at_least=500)


@pytest.mark.quick
@pytest.mark.timeout(200)
def test_etcd_is_wiped(trial: StartTrial) -> None:
    """Neither what was in flight, nor what comes, nor what the service remembers is acked."""
    attempt = trial("etcd wiped")
    broker, etcd = attempt.broker, attempt.servers.etcd
    service = attempt.start()
    # Recorded before, and gone with the data: the attempt judges what comes after.
    known = broker.publish(orders(20, "known"))
    becomes(lambda: attempt.store.done("order"), ids(known))
    # A record can be there before its answer is: what was not acked by now would be held, too.
    becomes(lambda: broker.unacked("order"), 0)
    etcd.kill()
    attempt.publish(orders(30, "held"))
    becomes(lambda: broker.unacked("order"), 30)
    etcd.wipe()
    settles_nothing(attempt, service, ANOTHER, lambda: attempt.publish(known + orders(30, "new")))
    assert attempt.store.client.get() == []
    assert service.terminate(10) == 0
    assert times_returned(attempt.servers.rabbitmq, "order") == [1] * 80
    assert says(attempt.start(), "no history of this service")
    attempt.recovers()
    attempt.judge(at_least=80, first_revision=1)


@pytest.mark.timeout(200)
def test_etcd_is_wiped_in_mid_call(trial: StartTrial, receiver: Receiver) -> None:
    """A call that ends in another etcd's time is not recorded there: it is made again."""
    attempt = trial("etcd wiped", service="notify")
    service = attempt.start(NOTIFY_URL=receiver.url)
    receiver.hold()
    called = attempt.publish(orders(10, "called"))
    becomes(lambda: set(receiver.per_key()), ids(called))
    attempt.servers.etcd.wipe()
    receiver.release()
    settles_nothing(attempt, service, ANOTHER, lambda: attempt.publish(orders(10, "new")))
    assert attempt.store.client.get() == []
    assert receiver.per_key() == dict.fromkeys(ids(called), 1)
    assert service.terminate(10) == 0
    attempt.start(NOTIFY_URL=receiver.url)
    attempt.recovers()
    attempt.judge(at_least=20, first_revision=1)
    assert Counter(receiver.per_key().values()) == {2: 10, 1: 11}


@pytest.mark.timeout(200)
def test_etcd_is_restored_from_an_older_snapshot(trial: StartTrial) -> None:
    """Nothing is acked, not even what the snapshot still holds, until the service is restarted."""
    attempt = trial("etcd restored from an older snapshot")
    broker, store, etcd = attempt.broker, attempt.store, attempt.servers.etcd
    service = attempt.start()
    saved = attempt.publish(orders(20, "saved"))
    becomes(lambda: store.done("order"), ids(saved))
    etcd.save()
    for number in range(SEEN_PAST_THE_SNAPSHOT):
        store.client.put("/elsewhere", str(number).encode())
    # Recorded and acked, and gone with the restoring: for the operator to know, not for us.
    gone = broker.publish(orders(20, "gone"))
    becomes(lambda: store.done("order"), ids(saved + gone))
    before = store.client.revision()
    etcd.restore()
    assert store.client.revision() < before - SEEN_PAST_THE_SNAPSHOT
    restored = "restored from an older state"
    settles_nothing(attempt, service, restored, lambda: attempt.publish(saved + orders(30, "new")))
    assert store.done("order") == ids(saved)
    assert service.terminate(10) == 0
    attempt.start()
    attempt.recovers()
    attempt.judge(at_least=50)


def settles_nothing(
    attempt: Trial, service: Service, why: str, publish: Callable[[], object]
) -> None:
    """Wait until the service holds for such a reason, and see it hold what is published then."""
    eventually(partial(holds, service, why))
    eventually(partial(says, service, "not the one seen before"))
    attempt.fired()
    held = attempt.broker.unacked(attempt.service)
    with attempt.acks.none_pass():
        before = attempt.sent
        publish()
        becomes(lambda: attempt.broker.unacked(attempt.service), held + attempt.sent - before)
        throughout(5, partial(holds, service, why))
