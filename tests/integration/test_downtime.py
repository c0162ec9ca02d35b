"""Services are down, or what they need is not there or has no address yet, and comes later."""

import socket
from contextlib import ExitStack
from functools import partial
from itertools import product
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
from servers.wait import eventually

pytestmark = pytest.mark.short

READY_WITHIN_S = 10.0
# The service looks statsd's name up again every 30 s.
MOVED_WITHIN_S = 40.0


ABSENT = "broker and etcd absent at the start"
UNKNOWN = "names not resolvable at the start"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("last", ["etcd", "rabbitmq"])
@pytest.mark.parametrize(
    ("fault", "seconds"), [quick(ABSENT, 1), *product((ABSENT, UNKNOWN), lasting(5, 120))]
)
def test_broker_and_etcd_come_late(
    trial: StartTrial, tmp_path: Path, last: str, fault: str, seconds: float
) -> None:
    """Alive, not ready, saying what is missing and why; without etcd nothing is consumed.

    A name that does not resolve is like a server that is not there.
    """
    attempt, hosts, settings = trial(fault), Hosts(tmp_path), dict[str, str]()
    assert attempt.start().terminate() == 0
    attempt.publish(orders(100, "before"))
    servers = {"rabbitmq": attempt.servers.rabbitmq, "etcd": attempt.servers.etcd}
    if fault == ABSENT:
        for server in servers.values():
            server.stop()
        come = {name: server.start for name, server in servers.items()}
    else:
        port = port_of(attempt.servers.etcd.endpoint)
        url = attempt.acks.url.replace("127.0.0.1", "rabbitmq.invalid")
        settings = {"RABBITMQ_URL": url, "ETCD_ENDPOINTS": f"etcd.invalid:{port}"}
        settings |= hosts.settings()
        come = {name: partial(hosts.point, f"{name}.invalid", "127.0.0.1") for name in servers}
    service = attempt.start(wait=False, **settings)

    def waits(*missing: str, tried: str) -> None:
        reasons = not_ready(service, *missing)
        assert reasons.get(tried) not in ("not connected yet", "not reached yet"), reasons
        assert service.health("/livez").status == 200

    # Nothing is asked of the broker before etcd is there.
    both_away = partial(waits, "rabbitmq", "etcd", tried="etcd")
    eventually(both_away, also=(OSError,))
    throughout(seconds, both_away)
    attempt.fired()
    (first,) = set(servers) - {last}
    come[first]()
    if first == "etcd":
        becomes(lambda: "etcd" in not_ready(service, last), False, READY_WITHIN_S)
    eventually(partial(waits, last, tried=last))

    def still_waits() -> None:
        waits(last, tried=last)
        if last == "etcd":
            assert attempt.broker.depth("order") == (100, 0)
            assert attempt.broker.consumers("order") == 0

    throughout(seconds, still_waits)
    attempt.fired()
    come[last]()
    attempt.recovers(READY_WITHIN_S)
    service.wait_ready()
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
