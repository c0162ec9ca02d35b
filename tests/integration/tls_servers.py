"""A broker and an etcd node that want TLS and a client's certificate, beside their plain ports.

In containers only: the plain ports are the tests' own, through which they publish and read.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from integration.certificates import Authority
from integration.containers import container
from servers.ports import free_port
from servers.server import Etcd, RabbitMQ
from servers.servers import Servers, image

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


@dataclass(frozen=True)
class TlsServers(Servers):
    """The servers; their settings lead a service to the ports with TLS."""

    authority: Authority
    amqps_port: int
    https_port: int

    def settings(self) -> dict[str, str]:
        """Return the contract's variables, with all that TLS needs."""
        certificate, key = (str(file) for file in self.authority.sign("order"))
        files = {"CA_CERT": str(self.authority.certificate), "CERT": certificate, "KEY": key}
        return {
            "RABBITMQ_URL": f"amqps://guest:guest@127.0.0.1:{self.amqps_port}/",
            "ETCD_ENDPOINTS": f"https://127.0.0.1:{self.https_port}",
            "ETCD_MAX_TXN_OPS": str(self.etcd.max_txn_ops),
            **{
                f"{server}_{name}": file
                for server in ("RABBITMQ", "ETCD")
                for name, file in files.items()
            },
        }


@contextmanager
def start_tls_servers(directory: Path) -> Iterator[TlsServers]:
    """Start both servers with certificates for 127.0.0.1, and leave nothing behind."""
    authority = Authority(directory)
    authority.sign("server", "IP:127.0.0.1")
    conf = directory / "rabbitmq.conf"
    conf.write_text(_RABBITMQ_CONF)
    amqp, management, amqps, http, https = (free_port() for _ in range(5))
    mounts = (f"{directory}:/tls:ro", f"{conf}:/etc/rabbitmq/conf.d/30-tls.conf:ro")
    with ExitStack() as stack:
        broker = stack.enter_context(
            container(image("IMAGE_RABBITMQ"), {5672: amqp, 15672: management, 5671: amqps}, mounts)
        )
        store = stack.enter_context(
            container(image("IMAGE_ETCD"), {2379: http, 2381: https}, mounts[:1], _ETCD)
        )
        rabbitmq, etcd = RabbitMQ(broker, amqp, management), Etcd(store, http, 1024)
        rabbitmq.launch()
        etcd.start()
        rabbitmq.wait_ready()
        yield TlsServers("docker", rabbitmq, etcd, authority, amqps, https)
