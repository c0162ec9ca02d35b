"""Servers of a test's own in containers: of another version, with other settings, or with TLS.

Those with TLS want a client's certificate, beside their plain ports, through which the tests
publish and read. The certificates are made by OpenSSL's command: an authority for one test run, and
what it signs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from servers.containers import Container
from servers.processes import free_port, run_tool
from servers.servers import Etcd, RabbitMQ, Servers, image

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

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")
# Nothing of the machine's own openssl.cnf: what a certificate is for is said here.
_CONFIG = "[req]\ndistinguished_name = name\n[name]\n"


@contextmanager
def container(
    image_name: str,
    ports: dict[int, int],
    mounts: tuple[str, ...] = (),
    command: tuple[str, ...] = (),
    hostname: str = "server",
) -> Iterator[Container]:
    """Create a container with {port in it: port on this machine}, and remove it in the end."""
    server = Container(f"test-{token_hex(4)}")
    published = [f"--publish=127.0.0.1:{outside}:{inside}" for inside, outside in ports.items()]
    volumes = [f"--volume={mount}" for mount in mounts]
    named = (f"--name={server.name}", f"--hostname={hostname}")
    run_tool(["docker", "create", *named, *published, *volumes, image_name, *command])
    try:
        yield server
    finally:
        run_tool(["docker", "rm", "--force", "--volumes", server.name])


class Brokers:
    """Brokers that take each other's place: the same ports, node name and data."""

    def __init__(self, volume: str) -> None:
        self._volume = volume
        self._amqp_port, self._management_port = free_port(), free_port()

    @contextmanager
    def start(self, image_name: str, *mounts: str) -> Iterator[RabbitMQ]:
        """Start one, and remove it in the end; the data stays."""
        ports = {5672: self._amqp_port, 15672: self._management_port}
        data = f"{self._volume}:/var/lib/rabbitmq"
        with container(image_name, ports, (data, *mounts), hostname="rabbitmq") as node:
            rabbitmq = RabbitMQ(node, self._amqp_port, self._management_port)
            rabbitmq.start()
            yield rabbitmq


@contextmanager
def brokers() -> Iterator[Brokers]:
    """Give the place of a broker, whose data is removed in the end."""
    volume = f"test-{token_hex(4)}"
    run_tool(["docker", "volume", "create", volume])
    try:
        yield Brokers(volume)
    finally:
        run_tool(["docker", "volume", "rm", volume])


class Authority:
    """Signs certificates, whose files lie in its directory. Any user of the machine can read them.

    A server in a container runs as another user than the tests.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
        self.directory = directory
        self.certificate = directory / "ca.pem"
        (directory / "openssl.cnf").write_text(_CONFIG)
        self._make(
            "ca", "authority", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"
        )

    def sign(self, name: str, *addresses: str) -> tuple[Path, Path]:
        """Return the files of a certificate and its key, for a client or for a server.

        `addresses` are a server's, as in "IP:127.0.0.1" or "DNS:localhost".
        """
        extensions = ["basicConstraints=CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth"]
        if addresses:
            extensions.append(f"subjectAltName={','.join(addresses)}")
        authority = ("-CA", str(self.certificate), "-CAkey", str(self.directory / "ca.key"))
        return self._make(name, name, *extensions, signed_by=authority)

    def _make(
        self, file: str, subject: str, *extensions: str, signed_by: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        certificate, key = self.directory / f"{file}.pem", self.directory / f"{file}.key"
        files = ("-config", f"{self.directory}/openssl.cnf", "-keyout", f"{key}")
        named = ("-out", f"{certificate}", "-days", "2", "-subj", f"/CN={subject}")
        added = [part for extension in extensions for part in ("-addext", extension)]
        run_tool(["openssl", "req", "-x509", *files, *_KEY, *named, *signed_by, *added])
        key.chmod(0o644)
        return certificate, key


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
