"""Counters: shown from the start, adding up for any load, and never in the way of an event."""

import pytest

from integration.judging import (
    OUTCOMES,
    StartService,
    assert_counters_add_up,
    becomes,
    counters,
    parked,
    wait_drained,
)
from integration.load import ids, order, orders, repeated
from integration.sink import Sink
from servers.broker import Broker
from servers.ports import free_port
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually


def test_every_counter_shows_as_zero_from_the_start(
    start_service: StartService, statsd: StatsdListener
) -> None:
    """A graph that has no line yet cannot be told from a wrong name."""
    start_service("order")
    start_service("notify")
    expected = {
        *(f"{noun}_{end}" for noun in ("orders", "notifications") for end in OUTCOMES),
        "orders_received",
        "notifications_received",
        "notifications_sent",
    }
    eventually(lambda: _assert_seen(statsd, expected))
    assert set(statsd.counts().values()) == {0}


def test_counters_of_a_mixed_load_add_up(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """Each delivery ends in exactly one counter, the retried and the parked ones too."""
    services = [
        start_service("order"),
        start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="1s,1s"),
    ]
    sink.refuse("fails")
    sink.refuse("recovers", times=1)
    broker.publish(repeated(orders(300), 2))
    broker.publish([order("fails"), order("recovers"), *_ignored(7)])
    broker.publish([order("order-1", other="body"), order("order-2", other="body")])
    broker.publish_raw(b"not json")
    becomes(lambda: statsd.count("notifications_failed"), 1)
    wait_drained(broker, "order", "notify", "notify.retry.1s")
    for service in services:
        assert service.terminate() == 0
    same = {"processed_skipped": 300, "conflicted": 2, "ignored": 7, "invalid": 1}
    assert counters(statsd, "orders") == {**same, "received": 612, "processed": 302}
    assert counters(statsd, "notifications") == {
        **same,
        "received": 615,
        "processed": 301,
        "retried": 3,
        "failed": 1,
    }
    assert_counters_add_up(statsd, "orders")
    assert_counters_add_up(statsd, "notifications")
    assert statsd.count("notifications_sent") == 301
    assert len(parked(broker, "order", 3)) + 1 == len(parked(broker, "notify", 4))
    assert len(store.done("order")) == 302


def test_timers_are_sent(
    start_service: StartService, broker: Broker, statsd: StatsdListener
) -> None:
    """How long handling and committing took, and how late duplicates came, under a prefix."""
    start_service("order", STATSD_PREFIX="shop.")
    broker.publish(orders(5))
    becomes(lambda: statsd.count("shop.orders_processed"), 5)
    broker.publish(orders(5))

    def timed() -> None:
        assert statsd.timers_ms("shop.orders_handle")
        assert statsd.timers_ms("shop.orders_commit")
        assert statsd.timers_ms("shop.orders_duplicate_age")

    eventually(timed)


@pytest.mark.parametrize("host", ["127.0.0.1", "statsd.invalid"])
def test_events_flow_without_statsd(
    start_service: StartService, broker: Broker, store: Store, host: str
) -> None:
    """A port that nobody listens on, and a name that does not resolve."""
    service = start_service("order", STATSD_HOST=host, STATSD_PORT=str(free_port()))
    events = orders(2000)
    assert len(broker.publish(repeated(events, 2))) == 4000
    wait_drained(broker, "order")
    assert store.done("order") == ids(events)
    assert service.health().status == 200
    assert service.terminate(10) == 0


def _assert_seen(statsd: StatsdListener, expected: set[str]) -> None:
    if missing := expected - set(statsd.counts()):
        raise AssertionError(f"not shown: {missing}")


def _ignored(number: int) -> list[dict[str, str]]:
    return [{"id": f"ignored-{index}", "type": "order_paid"} for index in range(number)]
