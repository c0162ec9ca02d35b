"""A handler that fails is tried again later, on the broker, and its event is parked at last."""

from collections.abc import Callable

import pytest

from chaos.checks import (
    becomes,
    lines,
)
from chaos.load import order, orders
from chaos.receiver import Receiver
from chaos.rig import Rig
from servers.broker import encode
from servers.etcd import Store

TWICE = {"RETRY_DELAYS": "1s,2s"}
QUEUES = ("notify", "notify.retry.1s", "notify.retry.2s")


def test_failing_events_are_retried_then_parked_while_the_rest_goes_on(
    rig: Rig, receiver: Receiver
) -> None:
    """One always fails: three calls, then parked. Two recover. Forty never notice."""
    rig.start("notify", NOTIFY_URL=receiver.url, **TWICE)
    receiver.refuse("always")
    receiver.refuse("once", times=1)
    receiver.refuse("twice", times=2)
    fine = orders(40)
    events = [order("always", reason="none"), order("once"), order("twice"), *fine]
    rig.broker.publish(events)
    becomes(lambda: rig.statsd.count("notifications_failed"), 1)
    becomes(lambda: rig.statsd.count("notifications_processed"), 42)
    rig.drained(*QUEUES)
    (dead,) = rig.parked("notify", 1)
    assert dead.body == encode(events[0])
    assert dead.headers["x-reason"] == "failed"
    assert "answered 500" in dead.headers["x-error"]
    assert dead.headers["x-attempts"] == 3
    calls = receiver.per_key()
    assert (calls["always"], calls["once"], calls["twice"]) == (3, 2, 3)
    assert all(calls[event["id"]] == 1 for event in fine)
    rig.handled_once("notify", events, parked={"always"})
    assert "always" not in rig.store.done("notify")
    rig.counters_add_up("notifications")
    assert rig.counters("notifications")["retried"] == 5


def test_a_failing_event_waits_on_the_broker_and_not_in_the_process(
    rig: Rig, receiver: Receiver
) -> None:
    """It survives its service and its broker being killed in the meantime, with its attempts."""
    first = rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="7s,1s")
    receiver.refuse("e-1")
    rig.broker.publish([order("e-1")])
    becomes(lambda: rig.statsd.count("notifications_retried"), 1)
    assert rig.broker.ready("notify.retry.7s") == 1
    assert rig.broker.depth("notify") == (0, 0)
    first.kill()
    rig.servers.rabbitmq.kill()
    rig.servers.rabbitmq.start()
    rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="7s,1s")
    becomes(lambda: rig.statsd.count("notifications_failed"), 1, 60)
    (dead,) = rig.parked("notify", 1)
    assert dead.headers["x-attempts"] == 3
    assert receiver.per_key() == {"e-1": 3}
    assert rig.store.done("notify") == set()


@pytest.mark.parametrize("stall", [Receiver.hold, Receiver.drip])
def test_a_receiver_that_gives_no_whole_answer_is_a_failure_after_five_seconds(
    rig: Rig, receiver: Receiver, stall: Callable[[Receiver, str], None]
) -> None:
    """It says nothing, or sends its header drop by drop: each a sign of life, and no answer.

    Meanwhile others get through, and the connection to the broker stays.
    """
    service = rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="1s")
    stall(receiver, "slow")
    events = [order("slow"), order("fast")]
    rig.broker.publish(events)
    becomes(lambda: _states(rig.store), {"slow": "claimed", "fast": "done"})
    assert receiver.per_key() == {"slow": 1, "fast": 1}
    becomes(lambda: rig.statsd.count("notifications_retried"), 1)
    (failed,) = lines(service, "failed: it comes back later")
    assert failed["error"] == "TimeoutError: it took longer than 5 s"
    receiver.release()
    becomes(lambda: rig.store.done("notify"), {"slow", "fast"})
    assert receiver.per_key() == {"slow": 2, "fast": 1}
    assert service.health().status == 200
    assert lines(service, "no connection to RabbitMQ") == []
    rig.drained(*QUEUES[:2])
    rig.handled_once("notify", events)


def _states(store: Store) -> dict[str, str]:
    return {id_: record.state for id_, record in store.records("notify").items()}
