"""A service recovers after downtime: its own, and that of what it needs."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.checks import becomes, not_ready, throughout
from chaos.durations import lasting, quick
from chaos.hosts import Hosts
from chaos.load import orders
from chaos.network import port_of
from chaos.proxy import relay
from chaos.rig import Rig
from chaos.trial import StartTrial
from servers.processes import free_port
from servers.wait import eventually

pytestmark = pytest.mark.short

READY_WITHIN_S = 10.0
# A service resolves statsd's name again every 30 s.
MOVED_WITHIN_S = 40.0


def test_events_published_while_a_service_is_down_are_handled_afterwards(rig: Rig) -> None:
    assert rig.start("order").terminate() == 0
    rig.broker.publish(orders(20))
    assert rig.broker.ready("order") == 20
    rig.start("order")
    rig.handled_once("order", orders(20))


@pytest.mark.parametrize("name", ["rabbitmq", "etcd"])
def test_a_service_goes_on_by_itself_after_the_downtime_of_a_server(rig: Rig, name: str) -> None:
    """It skips what it had handled before."""
    service = rig.start("order")
    rig.broker.publish(orders(10))
    rig.handled_once("order", orders(10))
    server = getattr(rig.servers, name)
    server.stop()
    eventually(lambda: not_ready(service, name))
    server.start()
    rig.broker.publish(orders(20))
    rig.handled_once("order", orders(20))
    counted = {"received": 30, "processed": 20, "processed_skipped": 10}
    becomes(lambda: rig.counters("orders"), counted)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("last", ["etcd", "rabbitmq"])
@pytest.mark.parametrize("seconds", [quick(1), *lasting(5, 120)])
def test_broker_and_etcd_come_late(
    trial: StartTrial, tmp_path: Path, last: str, seconds: float
) -> None:
    """At first a name cannot be resolved, then no server answers there."""
    attempt, hosts = trial("broker and etcd absent at the start"), Hosts(tmp_path)
    assert attempt.start().terminate() == 0
    attempt.publish(orders(100, "before"))
    servers = {"rabbitmq": attempt.servers.rabbitmq, "etcd": attempt.servers.etcd}
    for server in servers.values():
        server.stop()
    service = attempt.start(
        wait=False,
        RABBITMQ_URL=attempt.acks.url.replace("127.0.0.1", "rabbitmq.invalid"),
        ETCD_ENDPOINTS=f"etcd.invalid:{port_of(attempt.servers.etcd.endpoint)}",
        **hosts.settings(),
    )
    missing = set(servers)

    def waits() -> None:
        """Alive and not ready, with the reason. The broker is not tried before etcd answers."""
        reasons = not_ready(service, *missing)
        assert ("etcd" in reasons) == ("etcd" in missing)
        tried = "etcd" if "etcd" in missing else "rabbitmq"
        assert reasons[tried] not in ("not connected yet", "not reached yet")
        assert service.health("/livez").status == 200
        if missing == {"etcd"}:
            assert attempt.broker.depth("order") == (100, 0)
            assert attempt.broker.consumers("order") == 0

    for name in sorted(servers, key=lambda name: name == last):
        eventually(waits, READY_WITHIN_S, also=(OSError,))
        throughout(seconds, waits)
        hosts.point(f"{name}.invalid", "127.0.0.1")
        throughout(seconds, waits)
        attempt.fired()
        servers[name].start()
        missing.remove(name)
    attempt.recovers(READY_WITHIN_S)
    service.wait_ready()
    attempt.judge(at_least=100)


def test_etcd_moves_to_another_address(trial: StartTrial, tmp_path: Path) -> None:
    """As a container does that is made again. The service resolves its name again."""
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
    """Events are handled all the while, and statsd is found again at its new address."""
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
    """Return a socket that receives statsd's packets."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.settimeout(MOVED_WITHIN_S)
    listener.bind((address, port))
    return listener
