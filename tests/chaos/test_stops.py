"""SIGTERM under load, again and again: exit 0 in time, with everything recorded that was begun."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from chaos.accounts import account
from chaos.conftest import StartTrial
from chaos.durations import often
from chaos.proxy import Proxy, relay
from chaos.signs import port_of
from chaos.timed_sink import TimedSink, listen_timed
from integration.judging import (
    StartService,
    becomes,
    counters,
    lines,
    not_ready,
    passes,
    throughout,
)
from integration.load import orders
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

WITHIN_S = 10
STOPS = 25
# Small transactions that take a while: there is something in hand at nearly each signal.
COMMIT_S = 0.02
SLOW = {"BATCH_SIZE": "16", "ETCD_MAX_TXN_OPS": "32"}


@pytest.fixture
def sink() -> Iterator[TimedSink]:
    """Give a receiver that takes a while for each call, so that signals fall into calls."""
    with listen_timed() as running:
        yield running


@pytest.fixture
def slow_way(clean: Servers) -> Iterator[Proxy]:
    """Give a way to etcd that takes a while."""
    with relay(port_of(clean.etcd.endpoint)) as running:
        running.delay(COMMIT_S / 2)
        yield running


@pytest.mark.timeout(300)
def test_stopped_25_times_in_a_row_in_the_middle_of_a_backlog(
    trial: StartTrial,
    start_audited: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    slow_way: Proxy,
) -> None:
    """Each id is published once, so a skipped delivery would be one of an event recorded before."""
    attempt = trial("SIGTERM under load")
    slow = {**SLOW, "ETCD_ENDPOINTS": slow_way.address}
    service = start_audited("order", **slow)
    assert service.terminate(WITHIN_S) == 0
    published = 0
    in_hand = []
    for stop in range(STOPS):
        if broker.ready("order") < 1000:
            published += len(attempt.publish(orders(3000, f"o{stop}")))
        before = store.client.revision()
        service = start_audited("order", **slow)
        passes(store.client.revision, before + 5)
        assert service.terminate(WITHIN_S) == 0
        assert broker.ready("order") > 0, "the backlog was gone before the signal"
        in_hand.append(stopping(service))
        attempt.fired()
    assert sum(number > 0 for number in in_hand) > STOPS / 2, in_hand
    service = start_audited("order")
    attempt.judge(at_least=4000)
    assert service.terminate(WITHIN_S) == 0
    # Nothing was recorded without its ack, and nothing went back that had been recorded.
    becomes(lambda: statsd.count("orders_processed"), published)
    counts = counters(statsd, "orders")
    assert "processed_skipped" not in counts
    assert counts["received"] == published + counts.get("returned", 0)


@pytest.mark.timeout(300)
def test_stopped_with_calls_under_way(
    trial: StartTrial,
    start_audited: Callable[..., Service],
    sink: TimedSink,
    store: Store,
) -> None:
    """The calls are finished and recorded by the process that made them, and nobody repeats one."""
    attempt = trial("notify: SIGTERM with calls under way", service="notify")
    start = partial(start_audited, "notify")
    running = [(name, start(NOTIFY_URL=sink.url_for(name))) for name in ("p0", "p1")]
    finished: set[str] = set()
    with attempt.load(rate_per_s=100) as load:
        attempt.works()
        for number in range(often(8, STOPS)):
            name, service = running.pop(0)
            sink.hold()
            eventually(partial(a_call_is_held, sink, name))
            os.kill(service.pid, signal.SIGTERM)
            eventually(partial(not_ready, service, "running"))
            throughout(1, partial(not_ready, service, "running"))
            in_call = sink.held(name)
            sink.release()
            assert service.wait_end(WITHIN_S) == 0
            assert in_call
            assert in_call <= store.done("notify")
            finished |= in_call
            attempt.fired()
            assert load.running
            name = f"p{number + 2}"
            running.append((name, start(NOTIFY_URL=sink.url_for(name))))
            attempt.works()
    attempt.judge(at_least=200)
    assert account(sink.spans, store.done("notify"), lambda *_: False) == set()
    of_records = store.steps("notify")
    assert {tuple(of_records[event_id]) for event_id in finished} == {("claimed", "done")}


def a_call_is_held(sink: TimedSink, caller: str) -> None:
    """Raise AssertionError unless a call of this process waits for the release."""
    assert sink.held(caller), "no call waits"


def stopping(service: Service) -> int:
    """Return how many deliveries a service had in hand when it began to stop."""
    (line,) = lines(service, "stopping: taking no more")
    in_hand: int = line["in_hand"]
    return in_hand
