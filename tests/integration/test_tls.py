"""TLS to both servers, with certificates on both sides, and what a wrong one leads to.

On their TLS ports the servers require a client certificate. The tests publish and read through the
plain ports. The openssl command makes an authority and the certificates that it signs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos.checks import becomes, lines, not_ready, says, throughout, true
from chaos.hosts import Hosts
from chaos.load import ids, orders, repeated
from chaos.outages import alarm
from chaos.rig import Rig
from servers.processes import cpu_s, free_port, run_tool
from servers.servers import Etcd, RabbitMQ, Servers, booted, image
from servers.wait import eventually

pytestmark = pytest.mark.usefixtures("docker")

_WATCHED_S = 4.0

_RABBITMQ_CONF = """
listeners.ssl.1 = 5671
ssl_options.cacertfile = /tls/ca.pem
ssl_options.certfile = /tls/server.pem
ssl_options.keyfile = /tls/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
"""
_ETCD = (
    "/usr/local/bin/etcd",
    "--data-dir=/etcd-data",
    "--listen-client-urls=http://0.0.0.0:2379,https://0.0.0.0:2381",
    "--advertise-client-urls=http://127.0.0.1:2379",
    "--cert-file=/tls/server.pem",
    "--key-file=/tls/server.key",
    "--trusted-ca-file=/tls/ca.pem",
    "--client-cert-auth",
    "--max-txn-ops=1024",
)


_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 2"
_CA = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
_SIGNED = (
    "basicConstraints=CA:FALSE",
    "extendedKeyUsage=serverAuth,clientAuth",
    "subjectAltName=IP:127.0.0.1",
)


def make_certificates(directory: Path, *names: str) -> None:
    """Make an authority, ca, and certificates that it signs, for servers and clients.

    All users may read them, since servers in containers run as other users.
    """
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    # So that the machine's own openssl.cnf adds nothing to the certificates.
    (directory / "openssl.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n")
    for name in ("ca", *names):
        files = f"-config {directory}/openssl.cnf -keyout {directory}/{name}.key"
        if name != "ca":
            files += f" -CA {directory}/ca.pem -CAkey {directory}/ca.key"
        command = f"openssl req -x509 {_KEY} {files} -out {directory}/{name}.pem -subj /CN={name}"
        added = [f"-addext={each}" for each in (_CA if name == "ca" else _SIGNED)]
        run_tool([*command.split(), *added])
        (directory / f"{name}.key").chmod(0o644)


@dataclass(frozen=True)
class TlsServers(Servers):
    """The servers, with settings for their TLS ports."""

    directory: Path
    amqps_port: int
    https_port: int

    def settings(self) -> dict[str, str]:
        """Return the variables that point a service at the TLS ports."""
        files = {"CA_CERT": "ca.pem", "CERT": "order.pem", "KEY": "order.key"}
        return {
            "RABBITMQ_URL": f"amqps://guest:guest@127.0.0.1:{self.amqps_port}/",
            "ETCD_ENDPOINTS": f"https://127.0.0.1:{self.https_port}",
            "ETCD_MAX_TXN_OPS": str(self.etcd.max_txn_ops),
            **{
                f"{server}_{name}": f"{self.directory}/{file}"
                for server in ("RABBITMQ", "ETCD")
                for name, file in files.items()
            },
        }


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServers]:
    """Give servers with TLS in place of the usual ones."""
    from servers.containers import prepare_container

    directory = tmp_path_factory.mktemp("tls")
    make_certificates(directory, "server", "order")
    conf = directory / "rabbitmq.conf"
    conf.write_text(_RABBITMQ_CONF)
    amqp, management, amqps, http, https = (free_port() for _ in range(5))
    tls = {str(directory): "/tls"}
    of_broker = {**tls, str(conf): "/etc/rabbitmq/conf.d/30-tls.conf"}
    broker = prepare_container(
        image("IMAGE_RABBITMQ"), {5672: amqp, 15672: management, 5671: amqps}, mounts=of_broker
    )
    store = prepare_container(image("IMAGE_ETCD"), {2379: http, 2381: https}, _ETCD, mounts=tls)
    rabbitmq, etcd = RabbitMQ(broker, amqp, management), Etcd(store, http)
    with booted(rabbitmq, etcd):
        yield TlsServers("docker", rabbitmq, etcd, directory, amqps, https)


def test_events_are_handled_once_over_tls(rig: Rig) -> None:
    """Both connections to the broker use the client's certificate."""
    rig.start("order")
    listed = rig.servers.rabbitmq.ctl(
        "list_connections", "--no-table-headers", "ssl", "peer_cert_subject"
    )
    assert [line.split() for line in listed.splitlines()] == [["true", "CN=order"]] * 2
    events = orders(300)
    confirmed = rig.broker.publish(repeated(events, 2))
    becomes(lambda: rig.store.done("order"), ids(events))
    rig.handled_once("order", events, confirmed)


NO_FILES = dict.fromkeys(("ETCD_CA_CERT", "ETCD_CERT", "ETCD_KEY"), "")
WRONG: dict[str, tuple[str, dict[str, str]]] = {
    "broker, another authority": ("certificate verify failed", {"RABBITMQ_CA_CERT": "{other}"}),
    "broker, another name": (
        "certificate is not valid for 'elsewhere.example'",
        {"RABBITMQ_URL": "amqps://guest:guest@elsewhere.example:{amqps}/"},
    ),
    "broker, no certificate": ("certificate", {"RABBITMQ_CERT": "", "RABBITMQ_KEY": ""}),
    "broker, a wrong password": (
        "refuses the user or the password",
        {"RABBITMQ_URL": "amqps://guest:no@127.0.0.1:{amqps}/"},
    ),
    "etcd, another authority": ("not from the authority", {"ETCD_CA_CERT": "{other}"}),
    "etcd, another name": ("other names", {"ETCD_ENDPOINTS": "https://elsewhere.example:{https}"}),
    "etcd, no certificate": ("ETCD_CERT", {"ETCD_CERT": "", "ETCD_KEY": ""}),
    "etcd, no TLS": ("ETCD_CA_CERT", NO_FILES | {"ETCD_ENDPOINTS": "127.0.0.1:{https}"}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_service_waits_and_says_what_is_wrong(
    rig: Rig, servers: TlsServers, tmp_path: Path, fault: str
) -> None:
    """Alive and not ready, with one clear reason; no busy loop; nothing is consumed."""
    why, wrong = WRONG[fault]
    missing = "etcd" if fault.startswith("etcd") else "rabbitmq"
    assert rig.start("order").terminate(10) == 0
    events = orders(20)
    rig.broker.publish(events)
    make_certificates(other := tmp_path / "other")
    known = {"other": other / "ca.pem", "amqps": servers.amqps_port, "https": servers.https_port}
    settings = {name: text.format(**known) for name, text in wrong.items()}
    hosts = Hosts(tmp_path)
    hosts.point("elsewhere.example", "127.0.0.1")
    service = rig.start("order", wait=False, **settings, **hosts.settings())

    def explained() -> None:
        reason = not_ready(service, missing)[missing]
        assert re.search(why, reason, re.IGNORECASE), reason
        assert "\n" not in reason

    eventually(explained, also=(OSError,))
    before_s = cpu_s(service.pid)
    throughout(_WATCHED_S, explained)
    assert cpu_s(service.pid) - before_s < _WATCHED_S / 4, "a busy loop"
    assert rig.broker.depth("order") == (len(events), 0)
    assert len(lines(service, "no connection to RabbitMQ")) < 5 * _WATCHED_S


def test_no_more_is_read_over_tls_while_too_much_is_in_flight(rig: Rig) -> None:
    """pika itself reads on as long as TLS has decrypted bytes. The alarm keeps bodies unparked."""
    assert rig.start("order").terminate() == 0
    bodies = [bytes([number]) * 15 * 1024 * 1024 for number in range(5)]
    rig.broker.publish_raw(*bodies)
    received = rig.statsd.count("orders_received")
    with alarm(rig.servers.rabbitmq, "memory"):
        service = rig.start("order")
        eventually(lambda: says(service, "what is in flight is large"))
        becomes(lambda: rig.statsd.count("orders_received"), received + 3)
        throughout(_WATCHED_S, lambda: true(rig.statsd.count("orders_received") == received + 3))
    assert sorted(message.body for message in rig.parked("order", len(bodies))) == bodies
    assert lines(service, "no connection to RabbitMQ") == []
