"""An event is handled once, however often it arrives: and every time where that is switched off."""

from integration.judging import StartService, becomes, lines, says, wait_drained
from integration.load import order, orders
from integration.sink import Call, Sink
from servers.broker import Broker
from servers.ports import free_port
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually


def test_order_places_an_event_that_arrives_three_times_once(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """One record, one order at version 1, one processed and two skipped."""
    start_service("order")
    event = order("e-1", item="tea")
    for _ in range(3):
        assert broker.publish([event]) == [event]
    becomes(lambda: statsd.count("orders_processed_skipped"), 2)
    assert statsd.count("orders_processed") == 1
    wait_drained(broker, "order")
    assert set(store.records("order")) == store.done("order") == {"e-1"}
    assert {id_: placed.version for id_, placed in store.orders().items()} == {"e-1": 1}
    assert len(store.history("/service/order/", "/orders/")) == 2


def test_three_copies_in_one_batch_are_handled_once(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """Copies that arrive together share one record, which neither restart nor cache explains."""
    assert start_service("order").terminate() == 0
    broker.publish([order("e-1"), order("e-2"), order("e-1"), order("e-1")])
    start_service("order")
    becomes(lambda: statsd.count("orders_processed_skipped"), 2)
    assert statsd.count("orders_processed") == 2
    assert {id_: placed.version for id_, placed in store.orders().items()} == {"e-1": 1, "e-2": 1}


def test_a_producer_that_writes_its_retry_differently_is_a_duplicate(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """Order of members, white space and members of the producer's own make no other event."""
    start_service("order")
    for body in (
        b'{"id":"e-1","type":"new_order","args":{"a":1,"b":2}}',
        b'{ "args": {"b": 2, "a": 1}, "type": "new_order", "id": "e-1" }',
        b'{"id":"e-1","type":"new_order","args":{"a":1,"b":2},"sent_at":"later","trace":"x"}',
    ):
        broker.publish_raw(body)
    becomes(lambda: statsd.count("orders_processed_skipped"), 2)
    assert statsd.count("orders_processed") == 1
    wait_drained(broker, "order")
    assert broker.ready("order.dead-letter") == 0
    assert store.done("order") == {"e-1"}


def test_notify_calls_once_for_an_event_that_arrives_three_times(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """One POST with the event's id as its key; the copies in mid-call wait for its end."""
    start_service("notify", NOTIFY_URL=sink.url)
    sink.hold()
    event = order("e-1", item="tea")
    broker.publish([event, event])
    becomes(lambda: statsd.count("notifications_received"), 2)
    becomes(lambda: len(sink.calls), 1)
    sink.release()
    becomes(lambda: statsd.count("notifications_processed"), 1)
    broker.publish([event])
    becomes(lambda: statsd.count("notifications_processed_skipped"), 2)
    assert statsd.count("notifications_sent") == 1
    assert sink.calls == [Call("e-1", event)]
    wait_drained(broker, "notify")
    assert store.done("notify") == {"e-1"}


def test_ids_that_look_alike_are_different_events(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """Slashes, case, Unicode forms, NUL and length tell ids apart; each gets an order."""
    start_service("order")
    names = [
        "a",
        "a/",
        "A",
        "\u00e9",
        "e\u0301",
        "a\x00",
        "/service/order/a",
        "x" * 10_000,
        "x" * 10_001,
        "sha256:a",
        " a",
        "..",
        "a b",
    ]
    events = [order(name) for name in names]
    assert len(broker.publish(events)) == len(names)
    becomes(lambda: statsd.count("orders_processed"), len(names))
    broker.publish(events)
    becomes(lambda: statsd.count("orders_processed_skipped"), len(names))
    assert len(store.client.get("/orders/")) == len(names)
    assert len(store.client.get("/service/order/")) == len(names)


def test_without_etcd_every_delivery_is_processed(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """No etcd is contacted, effects are dropped and said so, and notify calls each time."""
    nowhere = {"ENABLE_ETCD": "false", "ETCD_ENDPOINTS": f"127.0.0.1:{free_port()}"}
    service = start_service("order", **nowhere)
    start_service("notify", NOTIFY_URL=sink.url, **nowhere)
    before = store.client.revision()
    event = order("e-1")
    broker.publish([event] * 3)
    becomes(lambda: statsd.count("orders_processed"), 3)
    becomes(lambda: statsd.count("notifications_processed"), 3)
    assert sink.calls == [Call("e-1", event)] * 3
    wait_drained(broker, "order", "notify")
    assert statsd.count("orders_processed_skipped") == 0
    assert statsd.count("notifications_processed_skipped") == 0
    assert len(eventually(lambda: says(service, "effect dropped", 3))) == 3
    assert store.client.get() == []
    assert store.client.revision() == before


def test_duplicates_are_skipped_at_once_after_a_restart(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Imported records answer by themselves: even while etcd is frozen, and it writes nothing."""
    events = orders(25)
    first = start_service("order")
    broker.publish(events)
    becomes(lambda: statsd.count("orders_processed"), 25)
    assert first.terminate() == 0
    before = store.client.revision()

    second = start_service("order")
    imported = eventually(lambda: says(second, "records imported"))
    assert [line["records"] for line in imported] == [25]
    clean.etcd.pause()
    broker.publish(events)
    becomes(lambda: statsd.count("orders_processed_skipped"), 25)
    wait_drained(broker, "order")
    clean.etcd.resume()
    assert statsd.count("orders_processed") == 25
    assert store.client.revision() == before
    assert lines(second, "deliveries went back") == []
