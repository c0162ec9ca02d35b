"""Duplicates by the hundred, at the same instant, and with another body."""

import json
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from chaos.conftest import StartTrial
from chaos.durations import often
from chaos.proxy import Proxy, relay
from chaos.signs import port_of, true
from integration.judging import becomes, counters, parked
from integration.load import ids, order, orders, repeated
from servers.broker import Broker
from servers.publisher import Event, encode
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store, record_prefix
from servers.wait import eventually

TIMES = 100


def test_a_storm_of_duplicates(
    trial: StartTrial,
    start_audited: Callable[..., Service],
    broker: Broker,
    statsd: StatsdListener,
) -> None:
    """Each id a hundred times, shuffled, then all of one id in one batch: one record, 99 skips."""
    attempt = trial("duplicate storm, each id x100")
    service = start_audited("order")
    events = orders(often(50, 500))
    attempt.publish(repeated(events, TIMES))
    attempt.recovers()
    service.pause()
    attempt.publish([order("together")] * TIMES)
    becomes(lambda: broker.depth("order"), (0, TIMES))
    service.resume()
    storms = len(events) + 1
    # The probe of the recovery is one more event.
    becomes(
        lambda: counters(statsd, "orders"),
        {
            "received": storms * TIMES + 1,
            "processed": storms + 1,
            "processed_skipped": storms * (TIMES - 1),
        },
    )
    attempt.fired(storms)
    attempt.judge(at_least=storms)


@pytest.mark.timeout(600)
def test_two_replicas_get_the_same_event_at_the_same_instant(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    statsd: StatsdListener,
) -> None:
    """Both transactions are held before etcd, then let go together: one wins, the other skips."""
    attempt = trial("two replicas, same id, same instant")
    with ExitStack() as stack:
        port = port_of(clean.etcd.endpoint)
        ways = [stack.enter_context(relay(port)) for _ in range(2)]
        for number, way in enumerate(ways):
            start_audited("order", ETCD_ENDPOINTS=way.address, STATSD_PREFIX=f"replica{number}")
        # Before its first commit a service asks for a lease: that is done when these are.
        warm = attempt.publish(orders(20, "warm"))
        becomes(attempt.done, len(warm))
        times = often(60, 1000)
        for number in range(times):
            _let_go_together(attempt.publish, ways, order(f"same-{number}"))
            becomes(attempt.done, len(warm) + number + 1)
            attempt.fired()
        attempt.recovers()
        attempt.judge(at_least=times)
    becomes(lambda: _sum(statsd, "processed"), len(warm) + times + 1)
    becomes(lambda: _sum(statsd, "processed_skipped"), times)


def _let_go_together(
    publish: Callable[[list[Event]], list[Event]], ways: list[Proxy], event: Event
) -> None:
    for way in ways:
        way.hold("up")
    publish([event, event])
    key = (record_prefix("order") + event["id"]).encode()
    eventually(lambda: true(all(way.up.holds(key) for way in ways)), interval_s=0.01)
    for way in ways:
        way.release()


def _sum(statsd: StatsdListener, outcome: str) -> int:
    return sum(statsd.count(f"replica{number}.orders_{outcome}") for number in range(2))


def test_an_id_is_used_again_with_another_body(
    trial: StartTrial,
    start_audited: Callable[..., Service],
    broker: Broker,
    store: Store,
) -> None:
    """The first wins, be the second in the same batch; the second is parked, the record stays."""
    attempt = trial("same id, other body")
    service = start_audited("order")
    apart = [(order(f"apart-{n}", n=n), order(f"apart-{n}", n=-n - 1)) for n in range(10)]
    together = [(order(f"both-{n}", n=n), order(f"both-{n}", n=-n - 1)) for n in range(10)]
    attempt.publish([first for first, _ in apart])
    becomes(attempt.done, len(apart))
    before = _stored(store)
    attempt.publish([second for _, second in apart])
    service.pause()
    attempt.publish([event for pair in together for event in pair])
    service.resume()
    seconds = [second for _, second in (*apart, *together)]
    found = parked(broker, "order", len(seconds))
    assert sorted(message.body for message in found) == sorted(map(encode, seconds))
    assert {message.headers["x-reason"] for message in found} == {"conflict"}
    attempt.fired(len(found))
    attempt.recovers()
    after = _stored(store)
    assert {key: after[key] for key in before} == before
    firsts = [first for first, _ in (*apart, *together)]
    placed = store.orders()
    for first in firsts:
        assert json.loads(placed[first["id"]].value)["args"] == first["args"]
    attempt.judge(at_least=len(firsts), parked=ids(seconds))


def _stored(store: Store) -> dict[str, bytes]:
    """Return every record's bytes and every order's by their keys."""
    return {found.key: found.value for found in store.client.get("/")}
