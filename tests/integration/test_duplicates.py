"""An event is handled once, however often and wherever it arrives, and with whatever body."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest

from chaos.checks import becomes, true
from chaos.durations import often
from chaos.load import ids, order, orders, repeated
from chaos.network import port_of
from chaos.proxy import Proxy, relay
from chaos.trial import StartTrial
from servers.broker import Event, encode
from servers.counters import StatsdListener
from servers.etcd import Store, record_prefix
from servers.wait import eventually

pytestmark = pytest.mark.short

TIMES = 100


@pytest.mark.quick
def test_a_storm_of_duplicates(trial: StartTrial) -> None:
    """Each id a hundred times, shuffled, then all of one id in one batch: one record, 99 skips."""
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
    # The probe of the recovery is one more event.
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
    """Both transactions are held before etcd, then let go together: one wins, the other skips."""
    attempt = trial("two replicas, same id, same instant")
    with ExitStack() as stack:
        port = port_of(attempt.servers.etcd.endpoint)
        ways = [stack.enter_context(relay(port)) for _ in range(2)]
        for number, way in enumerate(ways):
            attempt.start(ETCD_ENDPOINTS=way.address, STATSD_PREFIX=f"replica{number}")
        # Before its first commit a service asks for a lease: that is done when these are.
        warm = attempt.publish(orders(20, "warm"))
        becomes(attempt.done, len(warm))
        times = often(60, 1000)
        for number in range(times):
            let_go_together(attempt.publish, ways, order(f"same-{number}"))
            becomes(attempt.done, len(warm) + number + 1)
            attempt.fired()
        attempt.recovers()
        attempt.judge(at_least=times)
    becomes(partial(count_of_both, attempt.statsd, "processed"), len(warm) + times + 1)
    becomes(partial(count_of_both, attempt.statsd, "processed_skipped"), times)


@pytest.mark.quick
def test_an_id_is_used_again_with_another_body(trial: StartTrial) -> None:
    """The first wins, be the second in the same batch; the second is parked, the record stays."""
    attempt = trial("same id, other body")
    service, store = attempt.start(), attempt.store
    apart = [(order(f"apart-{n}", n=n), order(f"apart-{n}", n=-n - 1)) for n in range(10)]
    together = [(order(f"both-{n}", n=n), order(f"both-{n}", n=-n - 1)) for n in range(10)]
    attempt.publish([first for first, _ in apart])
    becomes(attempt.done, len(apart))
    before = stored(store)
    attempt.publish([second for _, second in apart])
    service.pause()
    attempt.publish([event for pair in together for event in pair])
    service.resume()
    seconds = [second for _, second in (*apart, *together)]
    found = attempt.rig.parked("order", len(seconds))
    assert sorted(message.body for message in found) == sorted(map(encode, seconds))
    assert {message.headers["x-reason"] for message in found} == {"conflict"}
    attempt.fired(len(found))
    attempt.recovers()
    after = stored(store)
    assert {key: after[key] for key in before} == before
    firsts = [first for first, _ in (*apart, *together)]
    placed = store.effects("/orders/")
    for first in firsts:
        assert json.loads(placed[first["id"]].value)["args"] == first["args"]
    attempt.judge(at_least=len(firsts), parked=ids(seconds))


def let_go_together(
    publish: Callable[[list[Event]], list[Event]], ways: list[Proxy], event: Event
) -> None:
    """Publish an event to two replicas, and let their transactions go at the same instant."""
    for way in ways:
        way.hold("up")
    publish([event, event])
    key = (record_prefix("order") + event["id"]).encode()
    eventually(lambda: true(all(way.up.holds(key) for way in ways)), interval_s=0.01)
    for way in ways:
        way.release()


def count_of_both(statsd: StatsdListener, outcome: str) -> int:
    """Return how many deliveries to both replicas had this outcome."""
    return sum(statsd.count(f"replica{number}.orders_{outcome}") for number in range(2))


def stored(store: Store) -> dict[str, bytes]:
    """Return every record's bytes and every order's by their keys."""
    return {found.key: found.value for found in store.client.get("/")}
