"""SIGTERM and SIGINT: take no more, settle what is in flight, exit 0 within 10 s."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from chaos.checks import (
    StartService,
    becomes,
    lines,
    not_ready,
    passes,
    throughout,
    true,
)
from chaos.durations import often, quick
from chaos.load import ids, order, orders
from chaos.network import port_of
from chaos.proxy import Proxy, relay
from chaos.receiver import Receiver, account
from chaos.rig import Rig
from chaos.trial import StartTrial
from servers.broker import Depth
from servers.processes import free_port
from servers.servers import Servers
from servers.services import Service
from servers.wait import eventually

WITHIN_S = 10
STOPS = 25
# Small transactions that take a while: there is something in flight at nearly each signal.
COMMIT_S = 0.02
SLOW = {"BATCH_SIZE": "16", "ETCD_MAX_TXN_OPS": "32"}

CALLS_AT_ONCE = 100

_CALLS = """
import os
import sys
import urllib.request

import aiohttp

from idempotent_consumer import Service

service = Service("notify", noun="notifications")
URL = os.environ["NOTIFY_URL"]


def plain(event, timeout_s):
    request = urllib.request.Request(URL, b"{}", {"Idempotency-Key": event.id})
    urllib.request.urlopen(request).close()


async def coroutine(event, timeout_s):
    async with aiohttp.ClientSession() as session:
        await session.post(URL, data=b"{}", headers={"Idempotency-Key": event.id})


service.claimed_handler("new_order", timeout_s=60)(globals()[sys.argv[1]])
sys.exit(service.run())
"""


def terminate(service: Service) -> int:
    """Send SIGTERM, and return the exit code."""
    return service.terminate(WITHIN_S)


def interrupt(service: Service) -> int:
    """Send SIGINT, and return the exit code."""
    service.interrupt()
    return service.wait_end(WITHIN_S)


@pytest.fixture
def slow_way(clean: Servers) -> Iterator[Proxy]:
    """Give a way to etcd that takes a while."""
    with relay(port_of(clean.etcd.endpoint)) as running:
        running.delay(COMMIT_S / 2)
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stops", [quick(4), STOPS])
def test_stopped_again_and_again_in_the_middle_of_a_backlog(
    trial: StartTrial, slow_way: Proxy, stops: int
) -> None:
    """Each id is published once, so a skipped delivery would be one of an event recorded before."""
    attempt = trial("stopped under load")
    store, slow = attempt.store, {**SLOW, "ETCD_ENDPOINTS": slow_way.address}
    assert terminate(attempt.start(**slow)) == 0
    published = 0
    in_flight = []
    for number in range(stops):
        if attempt.broker.ready("order") < 1000:
            published += len(attempt.publish(orders(3000, f"o{number}")))
        before = store.client.revision()
        service = attempt.start(**slow)
        passes(store.client.revision, before + 5)
        assert (interrupt if number % 2 else terminate)(service) == 0
        left = attempt.broker.depth("order")
        assert left.ready > 0, "the backlog was gone before the signal"
        assert left.unacked == 0
        (said,) = lines(service, "stopping: taking no more")
        in_flight.append(said["in_hand"])
        attempt.fired()
    assert sum(number > 0 for number in in_flight) > stops / 2, in_flight
    service = attempt.start()
    attempt.judge(at_least=published)
    assert terminate(service) == 0
    # Nothing was recorded without its ack, and nothing went back that had been recorded.
    becomes(lambda: attempt.statsd.count("orders_processed"), published)
    counts = attempt.rig.counters("orders")
    assert "processed_skipped" not in counts
    assert counts["received"] == published + counts.get("returned", 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stops", [quick(2), often(8, STOPS)])
def test_stopped_with_calls_under_way(trial: StartTrial, receiver: Receiver, stops: int) -> None:
    """The calls are finished and recorded by the process that made them, and nobody repeats one."""
    attempt = trial("notify: stopped with calls under way", service="notify")
    store = attempt.store

    def start(name: str) -> tuple[str, Service]:
        return name, attempt.start(NOTIFY_URL=receiver.url_for(name))

    running = [start("p0"), start("p1")]
    finished: set[str] = set()
    with attempt.load(rate_per_s=100) as load:
        attempt.works(100)
        for number in range(stops):
            name, service = running.pop(0)
            receiver.hold()
            eventually(partial(a_call_is_held, receiver, name))
            os.kill(service.pid, signal.SIGINT if number % 2 else signal.SIGTERM)
            eventually(partial(not_ready, service, "running"))
            throughout(1, partial(not_ready, service, "running"))
            in_call = receiver.held(name)
            receiver.release()
            assert service.wait_end(WITHIN_S) == 0
            assert in_call
            assert in_call <= store.done("notify")
            finished |= in_call
            attempt.fired()
            assert load.running
            running.append(start(f"p{number + 2}"))
            attempt.works()
    attempt.judge(at_least=50 * stops)
    assert account(receiver.calls, store.done("notify"), lambda *_: False) == set()
    of_records = store.steps("notify")
    assert {tuple(of_records[event_id]) for event_id in finished} == {("claimed", "done")}
    assert [terminate(service) for _, service in running] == [0, 0]
    attempt.rig.counters_add_up("notifications")


@pytest.mark.parametrize("handler", ["plain", "coroutine"])
def test_as_many_calls_as_there_can_be_are_finished_before_the_exit(
    rig: Rig, receiver: Receiver, tmp_path: Path, handler: str
) -> None:
    """Each is recorded by the process that made it; what waited for a slot is left to the next."""
    script = tmp_path / "service.py"
    script.write_text(_CALLS)

    def start(name: str) -> Service:
        return rig.start(
            "notify",
            command=[sys.executable, str(script), handler],
            NOTIFY_URL=receiver.url_for(name),
            CALLS_AT_ONCE=str(CALLS_AT_ONCE),
        )

    service = start("first")
    events = orders(2 * CALLS_AT_ONCE)
    receiver.hold()
    rig.broker.publish(events)
    becomes(lambda: receiver.number_under_way("first"), CALLS_AT_ONCE)
    becomes(lambda: rig.statsd.count("notifications_received"), 2 * CALLS_AT_ONCE)
    os.kill(service.pid, signal.SIGTERM)
    eventually(lambda: not_ready(service, "running"))
    made = receiver.held("first")
    receiver.release()
    assert service.wait_end(WITHIN_S) == 0
    assert len(made) == len(receiver.calls) == CALLS_AT_ONCE
    assert all(call.answered for call in receiver.calls)
    assert rig.store.done("notify") == rig.store.records("notify").keys() == made
    becomes(lambda: rig.broker.depth("notify"), Depth(CALLS_AT_ONCE, 0))
    becomes(
        lambda: rig.counters("notifications"),
        {
            "received": 2 * CALLS_AT_ONCE,
            "processed": CALLS_AT_ONCE,
            "returned": CALLS_AT_ONCE,
        },
    )
    start("second")
    rig.drained("notify")
    assert receiver.per_key() == dict.fromkeys(ids(events), 1)
    rig.handled_once("notify", events)


@pytest.mark.parametrize(("server", "stop"), [("rabbitmq", terminate), ("etcd", interrupt)])
def test_stopped_while_a_server_has_never_been_there(
    start_service: StartService,
    server: Literal["rabbitmq", "etcd"],
    stop: Callable[[Service], int],
) -> None:
    """There is nothing to settle, so it ends at once."""
    port = free_port()
    nowhere = {
        "rabbitmq": {"RABBITMQ_URL": f"amqp://guest:guest@127.0.0.1:{port}/"},
        "etcd": {"ETCD_ENDPOINTS": f"127.0.0.1:{port}"},
    }
    service = start_service("order", wait=False, **nowhere[server])
    eventually(lambda: not_ready(service, server), also=(OSError,))
    assert stop(service) == 0


def test_stopped_while_the_broker_is_frozen(rig: Rig) -> None:
    """A broker that does not answer the goodbye does not keep a service from ending."""
    service = rig.start("order")
    rig.broker.publish([order("e-1")])
    becomes(lambda: rig.store.done("order"), {"e-1"})
    rig.servers.rabbitmq.pause()
    assert terminate(service) == 0
    rig.servers.rabbitmq.resume()
    rig.start("order")
    rig.broker.publish([order("e-2")])
    becomes(lambda: rig.store.done("order"), {"e-1", "e-2"})
    rig.drained("order")


def a_call_is_held(receiver: Receiver, caller: str) -> None:
    """Raise AssertionError unless a call of this process waits for the release."""
    true(receiver.held(caller))
