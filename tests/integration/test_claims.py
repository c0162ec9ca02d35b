"""Calls to the outside happen under a claim: not twice for one event, and never not at all."""

from functools import partial

from integration.judging import (
    StartService,
    assert_counters_add_up,
    assert_handled_once,
    becomes,
    counters,
    passes,
    says,
    wait_drained,
)
from integration.load import Load, order, orders, repeated
from integration.sink import Sink
from servers.broker import Broker
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually


def test_a_call_goes_on_when_its_channel_is_closed_and_is_not_made_twice(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """The event comes back in mid-call and attaches to the call that is running."""
    service = start_service("notify", NOTIFY_URL=sink.url)
    sink.hold()
    events = [order("e-1")]
    broker.publish(events)
    becomes(lambda: len(sink.calls), 1)
    clean.rabbitmq.ctl("close_all_connections", "closed by the test")
    eventually(lambda: says(service, "deliveries went back"))
    becomes(lambda: statsd.count("notifications_received"), 2)
    assert store.records("notify")["e-1"].state == "claimed"
    sink.release()
    becomes(lambda: store.done("notify"), {"e-1"})
    wait_drained(broker, "notify")
    assert sink.per_key() == {"e-1": 1}
    assert store.steps("notify")["e-1"] == ["claimed", "done"]
    eventually(lambda: assert_counters_add_up(statsd, "notifications"))
    assert counters(statsd, "notifications") == {"received": 2, "processed": 1, "returned": 1}


def test_a_duplicate_in_another_replica_waits_for_the_call_and_is_skipped(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """A claim that another process holds is never acked; the call's end decides."""
    start_service("notify", NOTIFY_URL=sink.url, STATSD_PREFIX="first")
    sink.hold()
    event = order("e-1")
    broker.publish([event])
    becomes(lambda: len(sink.calls), 1)
    start_service("notify", NOTIFY_URL=sink.url, STATSD_PREFIX="second")
    # The broker deals out in turn, so the second replica gets at least one of these.
    broker.publish([event] * 4)
    passes(lambda: statsd.count("second.notifications_received"), 0)
    assert broker.unacked("notify") == 5
    sink.release()
    becomes(lambda: statsd.count("first.notifications_processed"), 1)
    wait_drained(broker, "notify")
    assert sink.per_key() == {"e-1": 1}
    assert store.steps("notify")["e-1"] == ["claimed", "done"]
    for prefix in ("first.", "second."):
        eventually(partial(assert_counters_add_up, statsd, "notifications", prefix=prefix))
    assert statsd.count("second.notifications_processed") == 0


def test_two_replicas_call_once_for_each_event_of_a_load(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """With duplicates on both at the same time, the receiver sees each key once."""
    for prefix in ("first", "second"):
        start_service("notify", NOTIFY_URL=sink.url, STATSD_PREFIX=prefix)
    events = orders(400)
    sent = repeated(events, 3)
    confirmed = broker.publish(sent)
    wait_drained(broker, "notify")
    assert_handled_once("notify", store, sent=sent, confirmed=confirmed, at_least=400)
    assert sink.per_key() == {event["id"]: 1 for event in events}
    for prefix in ("first.", "second."):
        passes(partial(statsd.count, f"{prefix}notifications_processed"), 0)


def test_calls_whose_process_was_killed_are_made_again_after_its_lease(
    start_service: StartService, broker: Broker, store: Store, sink: Sink
) -> None:
    """Under load: every event is called for, and twice only what was in mid-call, with its key.

    The record's history says in which order: claimed, gone with the lease, claimed anew, done.
    """
    at_once = 16
    service = start_service("notify", NOTIFY_URL=sink.url, CALLS_AT_ONCE=str(at_once))
    with Load(broker, rate_per_s=150) as load:
        passes(lambda: len(sink.calls), 100)
        sink.hold()
        called = len(sink.calls)
        passes(lambda: len(sink.calls), called)
        service.kill()
        assert load.running
        called = len(sink.calls)
        sink.release()
        start_service("notify", NOTIFY_URL=sink.url)
        passes(lambda: len(sink.calls), called + 100)
        confirmed = load.finish()
    wait_drained(broker, "notify", timeout_s=90)
    assert_handled_once("notify", store, sent=load.sent, confirmed=confirmed, at_least=200)
    calls = sink.per_key()
    assert set(calls) == store.done("notify")
    again = [key for key, number in calls.items() if number > 1]
    assert 0 < len(again) <= at_once
    for key in again:
        assert calls[key] == 2
        assert store.steps("notify")[key] == ["claimed", "gone", "claimed", "done"]
