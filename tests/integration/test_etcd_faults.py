"""etcd stops, freezes and loses its data: deliveries are held, and nothing is concluded."""

import re
import time

from integration.judging import (
    StartService,
    assert_each_delivered_once,
    assert_handled_once,
    becomes,
    lines,
    not_ready,
    passes,
    says,
    throughout,
    wait_drained,
)
from integration.load import Load, ids, orders
from servers.broker import Broker
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

BATCH = 32
# The library takes as much again as its four commits in flight hold.
IN_HAND_AT_MOST = 2 * 4 * BATCH


def test_etcd_restarted_under_load(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """The batch in hand is held until etcd is back; the broker never gets anything back."""
    service = start_service("order", BATCH_SIZE=str(BATCH))
    with Load(broker, rate_per_s=400) as load:
        passes(lambda: statsd.count("orders_processed"), 200)
        clean.etcd.stop()
        eventually(lambda: not_ready(service, "etcd"))
        passes(lambda: broker.unacked("order"), 0)
        assert load.running
        clean.etcd.start()
        service.wait_ready(10)
        handled = statsd.count("orders_processed")
        passes(lambda: statsd.count("orders_processed"), handled + 200)
        confirmed = load.finish()
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=load.sent, confirmed=confirmed, at_least=600)
    eventually(lambda: assert_each_delivered_once(statsd, "orders", len(load.sent)))


def test_etcd_frozen_for_ten_seconds_under_load(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Nothing is returned or acked, what is in hand stays bounded, the connection stays open."""
    service = start_service("order", BATCH_SIZE=str(BATCH))
    with Load(broker, rate_per_s=300) as load:
        passes(lambda: statsd.count("orders_processed"), 200)
        clean.etcd.pause()
        until_s = time.monotonic() + 10
        becomes(lambda: broker.unacked("order"), IN_HAND_AT_MOST)
        eventually(lambda: not_ready(service, "etcd"))

        def held() -> None:
            not_ready(service, "etcd")
            assert broker.unacked("order") == IN_HAND_AT_MOST

        throughout(until_s - time.monotonic(), held)
        assert load.running
        clean.etcd.resume()
        service.wait_ready(10)
        handled = statsd.count("orders_processed")
        passes(lambda: statsd.count("orders_processed"), handled + 500)
        confirmed = load.finish()
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=load.sent, confirmed=confirmed, at_least=1000)
    eventually(lambda: assert_each_delivered_once(statsd, "orders", len(load.sent)))
    assert lines(service, "no connection to RabbitMQ") == []


def test_a_wiped_etcd_stops_a_service_until_it_is_restarted(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    statsd: StatsdListener,
) -> None:
    """It says so and settles nothing, not even what it remembers; a restart accepts that etcd."""
    first = start_service("order")
    known, new = orders(20, "known"), orders(20, "new")
    broker.publish(known)
    becomes(lambda: statsd.count("orders_processed"), 20)
    clean.etcd.wipe()
    store = Store(clean.etcd)
    eventually(lambda: says(first, "not the one seen before"))
    assert re.search("wiped|older state", not_ready(first, "etcd")["etcd"])
    assert len(broker.publish(known + new)) == 40
    becomes(lambda: broker.unacked("order"), 40)
    assert store.client.get("/service/order/") == []
    assert first.terminate(10) == 0
    assert broker.depth("order") == (40, 0)

    second = start_service("order")
    wait_drained(broker, "order")
    assert store.done("order") == ids(known + new)
    assert says(second, "no history of this service")


def test_an_etcd_wiped_under_load_is_noticed_by_the_next_commit(
    clean: Servers, start_service: StartService, broker: Broker, statsd: StatsdListener
) -> None:
    """No event is recorded in the new life of etcd's data by a service that knew the old one."""
    service = start_service("order")
    with Load(broker, rate_per_s=400) as load:
        passes(lambda: statsd.count("orders_processed"), 100)
        clean.etcd.wipe()
        eventually(lambda: says(service, "not the one seen before"))
        assert load.running
        load.finish()
    store = Store(clean.etcd)
    assert store.client.get("/service/order/") == []
    assert store.client.get("/orders/") == []
    assert broker.unacked("order") > 0
