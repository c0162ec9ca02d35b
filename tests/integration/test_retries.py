"""A handler that fails is tried again later, on the broker, and its event is parked at last."""

import pytest

from integration.judging import (
    StartService,
    assert_counters_add_up,
    assert_handled_once,
    becomes,
    counters,
    lines,
    parked,
    wait_drained,
)
from integration.load import order, orders
from integration.sink import Sink
from servers.broker import Broker
from servers.publisher import encode
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

TWICE = {"RETRY_DELAYS": "1s,2s"}
QUEUES = ("notify", "notify.retry.1s", "notify.retry.2s")


def test_failing_events_are_retried_then_parked_while_the_rest_goes_on(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """One always fails: three calls, then parked. Two recover. Forty never notice."""
    start_service("notify", NOTIFY_URL=sink.url, **TWICE)
    sink.refuse("always")
    sink.refuse("once", times=1)
    sink.refuse("twice", times=2)
    fine = orders(40)
    events = [order("always", reason="none"), order("once"), order("twice"), *fine]
    broker.publish(events)
    becomes(lambda: statsd.count("notifications_failed"), 1)
    becomes(lambda: statsd.count("notifications_processed"), 42)
    wait_drained(broker, *QUEUES)
    (dead,) = parked(broker, "notify", 1)
    assert dead.body == encode(events[0])
    assert dead.headers["x-reason"] == "failed"
    assert "answered 500" in dead.headers["x-error"]
    assert dead.headers["x-attempts"] == 3
    calls = sink.per_key()
    assert (calls["always"], calls["once"], calls["twice"]) == (3, 2, 3)
    assert all(calls[event["id"]] == 1 for event in fine)
    assert_handled_once(
        "notify", store, sent=events, confirmed=events, at_least=43, parked={"always"}
    )
    assert "always" not in store.done("notify")
    eventually(lambda: assert_counters_add_up(statsd, "notifications"))
    assert counters(statsd, "notifications")["retried"] == 5


def test_a_failing_event_waits_on_the_broker_and_not_in_the_process(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """It survives its service and its broker being killed in the meantime, with its attempts."""
    first = start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="7s,1s")
    sink.refuse("e-1")
    broker.publish([order("e-1")])
    becomes(lambda: statsd.count("notifications_retried"), 1)
    assert broker.ready("notify.retry.7s") == 1
    assert broker.depth("notify") == (0, 0)
    first.kill()
    clean.rabbitmq.kill()
    clean.rabbitmq.start()
    start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="7s,1s")
    becomes(lambda: statsd.count("notifications_failed"), 1, 60)
    (dead,) = parked(broker, "notify", 1)
    assert dead.headers["x-attempts"] == 3
    assert sink.per_key() == {"e-1": 3}
    assert store.done("notify") == set()


def test_a_parked_event_can_be_sent_once_more(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """Published again after the receiver has been mended, it is a new event and not a duplicate."""
    start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="1s")
    sink.refuse("e-1", times=2)
    broker.publish([order("e-1")])
    becomes(lambda: statsd.count("notifications_failed"), 1)
    (dead,) = parked(broker, "notify", 1)
    broker.publish_raw(dead.body)
    becomes(lambda: store.done("notify"), {"e-1"})
    assert sink.per_key() == {"e-1": 3}


@pytest.mark.parametrize("etcd", ["true", "false"])
def test_copies_of_a_failing_event_fail_with_it(
    start_service: StartService,
    broker: Broker,
    statsd: StatsdListener,
    sink: Sink,
    etcd: str,
) -> None:
    """Every copy is parked, none is lost, with and without records."""
    start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="1s", ENABLE_ETCD=etcd)
    sink.refuse("e-1")
    broker.publish([order("e-1")] * 3)
    becomes(lambda: statsd.count("notifications_failed"), 3)
    wait_drained(broker, "notify", "notify.retry.1s")
    dead = parked(broker, "notify", 3)
    assert {message.body for message in dead} == {encode(order("e-1"))}
    eventually(lambda: assert_counters_add_up(statsd, "notifications"))


def test_a_receiver_that_does_not_answer_is_a_failure_after_five_seconds(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """Meanwhile others get through, and the connection to the broker stays."""
    service = start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="1s")
    sink.hold_only("slow")
    broker.publish([order("slow")])
    becomes(lambda: len(sink.calls), 1)
    broker.publish([order("fast")])
    becomes(lambda: _states(store), {"slow": "claimed", "fast": "done"})
    assert sink.per_key() == {"slow": 1, "fast": 1}
    becomes(lambda: statsd.count("notifications_retried"), 1)
    sink.release()
    becomes(lambda: store.done("notify"), {"slow", "fast"})
    assert sink.per_key() == {"slow": 2, "fast": 1}
    assert service.health().status == 200
    assert lines(service, "no connection to RabbitMQ") == []


def test_a_receiver_that_sends_its_header_drop_by_drop_is_a_failure_after_five_seconds(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """Each drop is a sign of life, and no answer: the call ends at its time-out all the same."""
    service = start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="1s")
    sink.drip_only("drips")
    events = [order("drips"), order("fast")]
    broker.publish(events)
    becomes(lambda: _states(store), {"drips": "claimed", "fast": "done"})
    becomes(lambda: statsd.count("notifications_retried"), 1)
    (failed,) = lines(service, "failed: it comes back later")
    assert failed["error"] == "TimeoutError: it took longer than 5 s"
    sink.release()
    becomes(lambda: store.done("notify"), {"drips", "fast"})
    assert sink.per_key() == {"drips": 2, "fast": 1}
    wait_drained(broker, *QUEUES[:2])
    assert_handled_once("notify", store, sent=events, confirmed=events, at_least=2)


def _states(store: Store) -> dict[str, str]:
    return {id_: record.state for id_, record in store.records("notify").items()}
