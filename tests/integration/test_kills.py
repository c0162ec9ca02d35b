"""Services that are killed in mid-work, and several at one queue."""

from integration.judging import (
    StartService,
    assert_counters_add_up,
    assert_handled_once,
    becomes,
    counters,
    passes,
    wait_drained,
)
from integration.load import Load, orders, repeated
from servers.broker import Broker
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

# Small transactions: a backlog then lasts long enough to be killed in the middle of it.
SLOW = {"BATCH_SIZE": "16", "ETCD_MAX_TXN_OPS": "32"}


def test_killed_again_and_again_under_load_with_duplicates(
    start_service: StartService, broker: Broker, store: Store
) -> None:
    """Six times SIGKILL with events outstanding: nothing lost, every order at version 1."""
    service = start_service("order", **SLOW)
    assert service.terminate() == 0
    events = orders(6000)
    sent = repeated(events, 2)
    confirmed = broker.publish(sent)
    for kill in range(6):
        before = store.client.revision()
        service = start_service("order", wait=False, **SLOW)
        passes(store.client.revision, before + 5 + 3 * kill)
        service.kill()
        assert broker.ready("order") > 0, "the backlog was gone before the kill"
    start_service("order")
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=sent, confirmed=confirmed, at_least=6000)
    assert broker.ready("order.dead-letter") == 0


def test_killed_with_deliveries_in_hand_while_events_keep_coming(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """Frozen until deliveries pile up in it, then killed: another process finishes them."""
    service = start_service("order")
    with Load(broker, rate_per_s=500) as load:
        for _ in range(3):
            handled = statsd.count("orders_processed")
            passes(lambda: statsd.count("orders_processed"), handled + 100)
            service.pause()
            passes(lambda: broker.unacked("order"), 0)
            service.kill()
            assert load.running
            service = start_service("order")
        confirmed = load.finish()
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=load.sent, confirmed=confirmed, at_least=300)


def test_two_replicas_share_a_queue_under_load_with_duplicates(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """Both do work, and their sum is exactly one handling an event."""
    first = start_service("order", STATSD_PREFIX="first", **SLOW)
    second = start_service("order", STATSD_PREFIX="second", **SLOW)
    sent = repeated(orders(3000), 3)
    confirmed = broker.publish(sent)
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=sent, confirmed=confirmed, at_least=3000)
    assert first.terminate() == second.terminate() == 0
    done = [counters(statsd, "orders", prefix=prefix) for prefix in ("first.", "second.")]
    assert all(each["processed"] > 100 for each in done)
    assert sum(each["processed"] for each in done) == 3000
    assert sum(each["processed_skipped"] for each in done) == 6000
    for prefix in ("first.", "second."):
        assert_counters_add_up(statsd, "orders", prefix=prefix)


def test_a_replica_takes_over_what_a_frozen_one_holds(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """The frozen one wakes to a closed connection: it loses its compares, its acks go nowhere."""
    frozen = start_service("order", STATSD_PREFIX="frozen")
    events = orders(50)
    frozen.pause()
    broker.publish(events)
    becomes(lambda: broker.unacked("order"), 50)
    clean.rabbitmq.ctl("close_all_connections", "closed by the test")
    start_service("order", STATSD_PREFIX="awake")
    becomes(lambda: statsd.count("awake.orders_processed"), 50)
    frozen.resume()
    becomes(lambda: statsd.count("frozen.orders_returned"), 50)
    frozen.wait_ready()
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=events, confirmed=events, at_least=50)
    eventually(lambda: assert_counters_add_up(statsd, "orders", prefix="frozen."))
