"""Counters: shown from the start, adding up for any load, and never in the way of an event."""

from chaos.checks import becomes, true
from chaos.load import order, orders, repeated
from chaos.receiver import Receiver
from chaos.rig import OUTCOMES, Rig
from servers.wait import eventually


def test_counters_of_a_mixed_load_add_up(rig: Rig, receiver: Receiver) -> None:
    """Each delivery ends in exactly one counter, the retried and the parked ones too.

    All of them show before there is an event: a graph that has no line yet cannot be told from a
    wrong name. Times are sent beside them.
    """
    services = [
        rig.start("order"),
        rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="1s,1s"),
    ]
    ends = [f"{noun}_{end}" for noun in ("orders", "notifications") for end in OUTCOMES]
    shown = ("orders_received", "notifications_received", "notifications_sent", *ends)
    eventually(lambda: true(rig.statsd.counts().items() >= dict.fromkeys(shown, 0).items()))
    receiver.refuse("fails")
    receiver.refuse("recovers", times=1)
    events = orders(300)
    rig.broker.publish(repeated(events, 2))
    ignored = [{"id": f"ignored-{index}", "type": "order_paid"} for index in range(7)]
    rig.broker.publish([order("fails"), order("recovers"), *ignored])
    rig.broker.publish([order("order-1", other="body"), order("order-2", other="body")])
    rig.broker.publish_raw(b"not json")
    becomes(lambda: rig.statsd.count("notifications_failed"), 1)
    rig.drained("order", "notify", "notify.retry.1s", "notify")
    # A duplicate that comes together with its first has no age.
    rig.broker.publish(events[:1])
    eventually(lambda: true(rig.statsd.timers_ms("orders_duplicate_age")))
    rig.drained("order", "notify")
    for service in services:
        assert service.terminate() == 0
    same = {"processed_skipped": 301, "conflicted": 2, "ignored": 7, "invalid": 1}
    last = {"received": 616, "processed": 301, "retried": 3, "failed": 1}
    becomes(lambda: rig.counters("orders"), {**same, "received": 613, "processed": 302})
    becomes(lambda: rig.counters("notifications"), {**same, **last})
    becomes(lambda: rig.statsd.count("notifications_sent"), 301)
    assert len(rig.parked("order", 3)) + 1 == len(rig.parked("notify", 4))
    assert len(rig.store.done("order")) == 302
    for timer in ("handle", "commit", "duplicate_age"):
        assert rig.statsd.timers_ms(f"orders_{timer}")
