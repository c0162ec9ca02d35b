"""Services are down, or what they need is not there or has no address yet, and comes later."""

import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from chaos.checks import becomes, not_ready, throughout
from chaos.durations import lasting, quick
from chaos.hosts import Hosts
from chaos.load import orders
from chaos.network import port_of
from chaos.proxy import relay
from chaos.trial import StartTrial
from servers.processes import free_port
from servers.services import Service
from servers.wait import eventually

pytestmark = pytest.mark.short

READY_WITHIN_S = 10.0
# The service looks statsd's name up again every 30 s.
MOVED_WITHIN_S = 40.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("last", ["etcd", "rabbitmq"])
@pytest.mark.parametrize("seconds", [quick(1), *lasting(5, 120)])
def test_broker_and_etcd_come_late(trial: StartTrial, last: str, seconds: float) -> None:
    """Alive, not ready, saying what is missing and why; without etcd nothing is consumed."""
    attempt = trial("broker and etcd absent at the start")
    assert attempt.start().terminate() == 0
    attempt.publish(orders(100, "before"))
    servers = {"rabbitmq": attempt.servers.rabbitmq, "etcd": attempt.servers.etcd}
    for server in servers.values():
        server.stop()
    service = attempt.start(wait=False)
    # Nothing is asked of the broker before etcd is there.
    lacks_both(service, seconds)
    attempt.fired()
    (first,) = set(servers) - {last}
    servers[first].start()
    if first == "etcd":
        becomes(lambda: "etcd" in not_ready(service, last), expected=False)
    eventually(partial(alive, service, last, tried=last))

    def still_waits() -> None:
        alive(service, last, tried=last)
        if last == "etcd":
            assert attempt.broker.depth("order") == (100, 0)
            assert attempt.broker.consumers("order") == 0

    throughout(seconds, still_waits)
    attempt.fired()
    servers[last].start()
    attempt.recovers(READY_WITHIN_S)
    service.wait_ready()
    attempt.judge(at_least=100)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", lasting(5, 120))
def test_names_are_known_late(trial: StartTrial, tmp_path: Path, seconds: float) -> None:
    """A name that does not resolve is like a server that is not there."""
    attempt = trial("names not resolvable at the start")
    hosts = Hosts(tmp_path)
    service = attempt.start(
        wait=False,
        RABBITMQ_URL=attempt.acks.url.replace("127.0.0.1", "rabbitmq.invalid"),
        ETCD_ENDPOINTS=f"etcd.invalid:{port_of(attempt.servers.etcd.endpoint)}",
        **hosts.settings(),
    )
    lacks_both(service, seconds)
    attempt.fired()
    hosts.point("etcd.invalid", "127.0.0.1")
    becomes(lambda: "etcd" in not_ready(service), expected=False, timeout_s=READY_WITHIN_S)
    throughout(seconds, partial(alive, service, "rabbitmq"))
    attempt.fired()
    hosts.point("rabbitmq.invalid", "127.0.0.1")
    attempt.recovers(READY_WITHIN_S)
    service.wait_ready()
    attempt.publish(orders(100))
    attempt.judge(at_least=100)


def test_etcd_moves_to_another_address(trial: StartTrial, tmp_path: Path) -> None:
    """As a container does that is made again: its name is looked up again, not only its address."""
    attempt = trial("etcd moved to another address")
    hosts = Hosts(tmp_path)
    hosts.point("etcd.invalid", "127.0.0.1")
    etcd_port = port_of(attempt.servers.etcd.endpoint)
    port = free_port()
    here, there = (socket.create_server((f"127.0.0.{number}", port)) for number in (1, 2))
    with relay(etcd_port, there), ExitStack() as until_it_moves:
        until_it_moves.enter_context(relay(etcd_port, here))
        service = attempt.start(ETCD_ENDPOINTS=f"etcd.invalid:{port}", **hosts.settings())
        with attempt.under_load():
            until_it_moves.close()
            eventually(lambda: not_ready(service, "etcd"))
            throughout(2, lambda: not_ready(service, "etcd"))
            attempt.fired()
            hosts.point("etcd.invalid", "127.0.0.2")
            attempt.recovers(READY_WITHIN_S)


@pytest.mark.timeout(200)
def test_statsd_is_unknown_then_closed_then_moved(trial: StartTrial, tmp_path: Path) -> None:
    """Events go on all the while, and statsd is found again where it has gone."""
    attempt = trial("statsd unknown, closed, moved")
    hosts = Hosts(tmp_path)
    port = free_port()
    with listen("127.0.0.1", port) as first, listen("127.0.0.2", port) as second:
        settings = {"STATSD_HOST": "statsd.invalid", "STATSD_PORT": str(port)}
        attempt.start(**settings, **hosts.settings())
        with attempt.under_load(rate_per_s=100):
            attempt.fired()
            hosts.point("statsd.invalid", "127.0.0.1")
            assert b"orders_received:" in first.recv(65536)
            first.close()
            attempt.works(100)
            attempt.fired()
            hosts.point("statsd.invalid", "127.0.0.2")
            assert b"orders_received:" in second.recv(65536)
            attempt.fired()


def listen(address: str, port: int) -> socket.socket:
    """Return a socket for statsd's packets."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.settimeout(MOVED_WITHIN_S)
    listener.bind((address, port))
    return listener


def lacks_both(service: Service, seconds: float) -> None:
    """Wait until a service lacks both servers, and see that it stays so, and alive."""
    both_away = partial(alive, service, "rabbitmq", "etcd", tried="etcd")
    eventually(both_away, also=(OSError,))
    throughout(seconds, both_away)


def alive(service: Service, *missing: str, tried: str = "") -> None:
    """Raise AssertionError unless it is alive and lacks these, one of which it has tried."""
    reasons = not_ready(service, *missing)
    assert reasons.get(tried) not in ("not connected yet", "not reached yet"), reasons
    assert service.health("/livez").status == 200
