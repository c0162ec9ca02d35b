"""An event is handled once, however often it arrives, at whichever replica, with whichever body."""

import json
from contextlib import ExitStack
from functools import partial
from itertools import chain

import pytest

from chaos.checks import becomes
from chaos.durations import often
from chaos.load import ids, order, orders, repeated
from chaos.network import port_of
from chaos.proxy import relay
from chaos.rig import Rig
from chaos.trial import StartTrial
from servers.broker import encode
from servers.etcd import record_prefix
from servers.wait import eventually

pytestmark = pytest.mark.short

TIMES = 100


def test_a_duplicate_is_skipped(rig: Rig) -> None:
    rig.start("order")
    rig.broker.publish([order("1"), order("2"), order("1")])
    counted = {"received": 3, "processed": 2, "processed_skipped": 1}
    becomes(lambda: rig.counters("orders"), counted)
    rig.handled_once("order", [order("1"), order("2")])


@pytest.mark.quick
def test_a_storm_of_duplicates(trial: StartTrial) -> None:
    """Each id comes 100 times, and one id 100 times in a single batch: one record, 99 skips."""
    attempt = trial("duplicate storm, each id x100")
    service = attempt.start()
    events = orders(often(50, 500))
    attempt.publish(repeated(events, TIMES))
    attempt.recovers()
    attempt.rig.drained("order")
    service.pause()
    attempt.publish([order("together")] * TIMES)
    becomes(lambda: attempt.broker.depth("order"), (0, TIMES))
    service.resume()
    storms = len(events) + 1
    # One event more is the probe of `recovers`.
    becomes(
        lambda: attempt.rig.counters("orders"),
        {
            "received": storms * TIMES + 1,
            "processed": storms + 1,
            "processed_skipped": storms * (TIMES - 1),
        },
    )
    attempt.fired(storms)
    attempt.judge(at_least=storms)


@pytest.mark.timeout(600)
def test_two_replicas_get_the_same_event_at_the_same_instant(trial: StartTrial) -> None:
    """Both transactions are held back, then released together: one lands, the other skips."""
    attempt, times = trial("two replicas, same id, same instant"), often(60, 1000)
    with ExitStack() as stack:
        port = port_of(attempt.servers.etcd.endpoint)
        ways = [stack.enter_context(relay(port)) for _ in range(2)]

        def both_hold(event_id: str) -> None:
            key = (record_prefix("order") + event_id).encode()
            assert all(way.up.holds(key) for way in ways)

        for number, way in enumerate(ways):
            attempt.start(ETCD_ENDPOINTS=way.address, STATSD_PREFIX=f"replica{number}")
        # Before its first commit a service asks for a lease, which must not be held back.
        warm = attempt.publish(orders(20, "warm"))
        becomes(attempt.done, len(warm))
        for number in range(times):
            for way in ways:
                way.hold("up")
            attempt.publish([order(f"same-{number}")] * 2)
            eventually(partial(both_hold, f"same-{number}"), interval_s=0.01)
            for way in ways:
                way.release()
            becomes(attempt.done, len(warm) + number + 1)
            attempt.fired()
        attempt.recovers()
        attempt.judge(at_least=times)

    def counted(outcome: str) -> int:
        return sum(attempt.statsd.count(f"replica{n}.orders_{outcome}") for n in range(2))

    becomes(partial(counted, "processed"), len(warm) + times + 1)
    becomes(partial(counted, "processed_skipped"), times)


@pytest.mark.quick
def test_an_id_is_used_again_with_another_body(trial: StartTrial) -> None:
    """The first is recorded, even if both are in one batch, and the second is parked."""
    attempt = trial("same id, other body")
    service, store = attempt.start(), attempt.store
    firsts = [order(f"{when}-{n}", n=n) for when in ("apart", "together") for n in range(10)]
    seconds = [order(event["id"], n=-1) for event in firsts]
    attempt.publish(firsts[:10])
    becomes(attempt.done, 10)
    before = store.client.get("/")
    attempt.publish(seconds[:10])
    service.pause()
    attempt.publish(list(chain(*zip(firsts[10:], seconds[10:], strict=True))))
    service.resume()
    found = attempt.rig.parked("order", len(seconds))
    assert sorted(message.body for message in found) == sorted(map(encode, seconds))
    assert {message.headers["x-reason"] for message in found} == {"conflict"}
    attempt.fired(len(found))
    attempt.recovers()
    assert set(before) <= set(store.client.get("/"))
    placed = store.effects("/orders/")
    for first in firsts:
        assert json.loads(placed[first["id"]].value)["args"] == first["args"]
    attempt.judge(at_least=len(firsts), parked=ids(seconds))
