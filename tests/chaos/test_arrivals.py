"""What the service needs is not there when it starts, or has no address, and comes later."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.durations import lasting
from chaos.hosts import Hosts
from chaos.proxy import relay
from chaos.signs import port_of
from integration.judging import becomes, not_ready, throughout
from integration.load import orders
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.wait import eventually

READY_WITHIN_S = 10.0
# The service looks statsd's name up again every 30 s.
MOVED_WITHIN_S = 40.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", lasting(5, 120))
def test_broker_and_etcd_come_late(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    broker: Broker,
    seconds: float,
) -> None:
    """Alive, not ready, saying what is missing; without etcd nothing is consumed."""
    attempt = trial("broker and etcd absent at the start")
    assert start_audited("order").terminate() == 0
    attempt.publish(orders(100, "before"))
    clean.rabbitmq.stop()
    clean.etcd.stop()
    service = start_audited("order", wait=False)
    eventually(lambda: not_ready(service, "rabbitmq", "etcd"), also=(OSError,))
    throughout(seconds, lambda: _alive(service, "rabbitmq", "etcd"))
    attempt.fired()
    clean.rabbitmq.start()
    throughout(seconds, lambda: _takes_nothing(broker, service))
    attempt.fired()
    clean.etcd.start()
    attempt.recovers(READY_WITHIN_S)
    service.wait_ready()
    attempt.judge(at_least=100)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", lasting(5, 120))
def test_names_are_known_late(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    start_audited: Callable[..., Service],
    tmp_path: Path,
    seconds: float,
) -> None:
    """A name that does not resolve is like a server that is not there."""
    attempt = trial("names not resolvable at the start")
    hosts = Hosts(tmp_path)
    settings = {
        "RABBITMQ_URL": acks.url.replace("127.0.0.1", "rabbitmq.invalid"),
        "ETCD_ENDPOINTS": f"etcd.invalid:{port_of(clean.etcd.endpoint)}",
        **hosts.settings(),
    }
    service = start_audited("order", wait=False, **settings)
    eventually(lambda: not_ready(service, "rabbitmq", "etcd"), also=(OSError,))
    throughout(seconds, lambda: _alive(service, "rabbitmq", "etcd"))
    attempt.fired()
    hosts.point("etcd.invalid", "127.0.0.1")
    becomes(lambda: "etcd" in not_ready(service), expected=False, timeout_s=READY_WITHIN_S)
    throughout(seconds, lambda: _alive(service, "rabbitmq"))
    attempt.fired()
    hosts.point("rabbitmq.invalid", "127.0.0.1")
    attempt.recovers(READY_WITHIN_S)
    service.wait_ready()
    attempt.publish(orders(100))
    attempt.judge(at_least=100)


def test_etcd_moves_to_another_address(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    tmp_path: Path,
) -> None:
    """As a container does that is made anew: its name is asked for again, not only its address."""
    attempt = trial("etcd moved to another address")
    hosts = Hosts(tmp_path)
    hosts.point("etcd.invalid", "127.0.0.1")
    etcd_port = port_of(clean.etcd.endpoint)
    with socket.create_server(("127.0.0.2", 0)) as there:
        port = _port(there)
        here = socket.create_server(("127.0.0.1", port))
        with relay(etcd_port, there), ExitStack() as until_it_moves:
            until_it_moves.enter_context(relay(etcd_port, here))
            settings = {"ETCD_ENDPOINTS": f"etcd.invalid:{port}", **hosts.settings()}
            service = start_audited("order", **settings)
            with attempt.load():
                attempt.works()
                until_it_moves.close()
                eventually(lambda: not_ready(service, "etcd"))
                throughout(2, lambda: not_ready(service, "etcd"))
                attempt.fired()
                hosts.point("etcd.invalid", "127.0.0.2")
                attempt.recovers(READY_WITHIN_S)
            attempt.judge(at_least=100)


@pytest.mark.timeout(200)
def test_statsd_is_unknown_then_closed_then_moved(
    trial: StartTrial, start_audited: Callable[..., Service], tmp_path: Path
) -> None:
    """Events go on all the while, and statsd is found again where it has gone."""
    attempt = trial("statsd unknown, closed, moved")
    hosts = Hosts(tmp_path)
    with _listen("127.0.0.1", 0) as first, _listen("127.0.0.2", _port(first)) as second:
        settings = {"STATSD_HOST": "statsd.invalid", "STATSD_PORT": str(_port(first))}
        start_audited("order", **settings, **hosts.settings())
        with attempt.load(rate_per_s=100):
            attempt.works(100)
            attempt.fired()
            hosts.point("statsd.invalid", "127.0.0.1")
            assert b"orders_received:" in first.recv(65536)
            first.close()
            attempt.works(100)
            attempt.fired()
            hosts.point("statsd.invalid", "127.0.0.2")
            assert b"orders_received:" in second.recv(65536)
            attempt.fired()
            attempt.recovers()
        attempt.judge(at_least=100)


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.settimeout(MOVED_WITHIN_S)
    listener.bind((address, port))
    return listener


def _port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def _alive(service: Service, *missing: str) -> None:
    not_ready(service, *missing)
    assert service.health("/livez").status == 200


def _takes_nothing(broker: Broker, service: Service) -> None:
    _alive(service, "etcd")
    assert broker.depth("order") == (100, 0)
    assert broker.consumers("order") == 0
