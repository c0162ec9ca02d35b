"""Counters: shown from the start, adding up for any load, and never in the way of an event."""

from chaos.checks import (
    becomes,
)
from chaos.load import order, orders, repeated
from chaos.receiver import Receiver
from chaos.rig import OUTCOMES, Rig
from servers.counters import StatsdListener
from servers.wait import eventually


def test_every_counter_shows_as_zero_from_the_start(rig: Rig) -> None:
    """A graph that has no line yet cannot be told from a wrong name."""
    rig.start("order")
    rig.start("notify")
    expected = {
        *(f"{noun}_{end}" for noun in ("orders", "notifications") for end in OUTCOMES),
        "orders_received",
        "notifications_received",
        "notifications_sent",
    }
    eventually(lambda: _assert_seen(rig.statsd, expected))
    assert set(rig.statsd.counts().values()) == {0}


def test_counters_of_a_mixed_load_add_up(rig: Rig, receiver: Receiver) -> None:
    """Each delivery ends in exactly one counter, the retried and the parked ones too."""
    services = [
        rig.start("order"),
        rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="1s,1s"),
    ]
    receiver.refuse("fails")
    receiver.refuse("recovers", times=1)
    rig.broker.publish(repeated(orders(300), 2))
    rig.broker.publish([order("fails"), order("recovers"), *_ignored(7)])
    rig.broker.publish([order("order-1", other="body"), order("order-2", other="body")])
    rig.broker.publish_raw(b"not json")
    becomes(lambda: rig.statsd.count("notifications_failed"), 1)
    rig.drained("order", "notify", "notify.retry.1s")
    for service in services:
        assert service.terminate() == 0
    same = {"processed_skipped": 300, "conflicted": 2, "ignored": 7, "invalid": 1}
    assert rig.counters("orders") == {**same, "received": 612, "processed": 302}
    assert rig.counters("notifications") == {
        **same,
        "received": 615,
        "processed": 301,
        "retried": 3,
        "failed": 1,
    }
    rig.counters_add_up("orders")
    rig.counters_add_up("notifications")
    assert rig.statsd.count("notifications_sent") == 301
    assert len(rig.parked("order", 3)) + 1 == len(rig.parked("notify", 4))
    assert len(rig.store.done("order")) == 302


def test_timers_are_sent(rig: Rig) -> None:
    """How long handling and committing took, and how late duplicates came, under a prefix."""
    rig.start("order", STATSD_PREFIX="shop.")
    rig.broker.publish(orders(5))
    becomes(lambda: rig.statsd.count("shop.orders_processed"), 5)
    rig.broker.publish(orders(5))

    def timed() -> None:
        assert rig.statsd.timers_ms("shop.orders_handle")
        assert rig.statsd.timers_ms("shop.orders_commit")
        assert rig.statsd.timers_ms("shop.orders_duplicate_age")

    eventually(timed)


def _assert_seen(statsd: StatsdListener, expected: set[str]) -> None:
    if missing := expected - set(statsd.counts()):
        raise AssertionError(f"not shown: {missing}")


def _ignored(number: int) -> list[dict[str, str]]:
    return [{"id": f"ignored-{index}", "type": "order_paid"} for index in range(number)]
