"""Start RabbitMQ and etcd: in containers where Docker answers, else as child processes."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servers.engine import docker_available
from servers.packages import ServersUnavailableError, ensure_installed
from servers.server import Etcd, RabbitMQ

REPOSITORY = Path(__file__).resolve().parents[2]

Kind = Literal["docker", "local"]


@dataclass(frozen=True)
class Servers:
    """A broker and an etcd node, and which way they run."""

    kind: Kind
    rabbitmq: RabbitMQ
    etcd: Etcd

    def settings(self) -> dict[str, str]:
        """Return the contract's variables that lead a service to these servers."""
        return {
            "RABBITMQ_URL": self.rabbitmq.url,
            "ETCD_ENDPOINTS": self.etcd.endpoint,
            "ETCD_MAX_TXN_OPS": str(self.etcd.max_txn_ops),
        }

    def heal(self) -> None:
        """Start or resume whichever server a failed test has left down or frozen."""
        self.rabbitmq.heal()
        self.etcd.heal()


@contextmanager
def start_servers(
    *,
    kind: Kind | None = None,
    max_txn_ops: int = 1024,
    quota_bytes: int = 8 << 30,
    etcd_flags: Sequence[str] = (),
) -> Iterator[Servers]:
    """Start both servers, yield them when both answer, and leave nothing behind.

    `kind` None means: containers if Docker answers. The other parameters are etcd's flags;
    what `etcd_flags` has stands last, and so overrides them.
    Raises ServersUnavailableError, whose message is one line, if there are no servers to be had.
    """
    chosen = kind or ("docker" if docker_available() else "local")
    flags = (*_etcd_flags(max_txn_ops, quota_bytes), *etcd_flags)
    with ExitStack() as stack:
        if chosen == "docker":
            servers = _containers(stack, flags, max_txn_ops)
        else:
            servers = _processes(stack, flags, max_txn_ops)
        # Both boot side by side: the broker's three seconds hide etcd's half.
        servers.rabbitmq.launch()
        servers.etcd.launch()
        servers.rabbitmq.wait_ready()
        servers.etcd.wait_ready()
        yield servers


@contextmanager
def start_etcd(
    kind: Kind, *more_flags: str, max_txn_ops: int = 1024, quota_bytes: int = 8 << 30
) -> Iterator[Etcd]:
    """Start an etcd node beside those that there are, and leave nothing behind."""
    flags = (*_etcd_flags(max_txn_ops, quota_bytes), *more_flags)
    with ExitStack() as stack:
        etcd = (_etcd_container if kind == "docker" else _etcd_process)(stack, flags, max_txn_ops)
        etcd.start()
        yield etcd


def _etcd_flags(max_txn_ops: int, quota_bytes: int) -> tuple[str, ...]:
    """Return etcd's flags, those of the compose files but for one.

    It never compacts by itself: tests read its history from the first revision.
    """
    return (
        f"--max-txn-ops={max_txn_ops}",
        f"--quota-backend-bytes={quota_bytes}",
        "--snapshot-count=1000",
        "--experimental-snapshot-catchup-entries=500",
        "--auto-compaction-retention=0",
        "--log-level=warn",
    )


def _containers(stack: ExitStack, flags: tuple[str, ...], max_txn_ops: int) -> Servers:
    # Imported here: a machine without Docker needs neither testcontainers nor its settings.
    from servers.containers import container_rabbitmq

    rabbitmq = container_rabbitmq(image("IMAGE_RABBITMQ"))
    stack.callback(rabbitmq.close)
    return Servers("docker", rabbitmq, _etcd_container(stack, flags, max_txn_ops))


def _etcd_container(stack: ExitStack, flags: tuple[str, ...], max_txn_ops: int) -> Etcd:
    from servers.containers import container_etcd

    etcd = container_etcd(image("IMAGE_ETCD"), flags, max_txn_ops)
    stack.callback(etcd.close)
    return etcd


def _processes(stack: ExitStack, flags: tuple[str, ...], max_txn_ops: int) -> Servers:
    from servers.local import local_rabbitmq

    ensure_installed()
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="servers-")))
    rabbitmq = local_rabbitmq(directory)
    stack.callback(rabbitmq.close)
    return Servers("local", rabbitmq, _etcd_process(stack, flags, max_txn_ops))


def _etcd_process(stack: ExitStack, flags: tuple[str, ...], max_txn_ops: int) -> Etcd:
    from servers.local import local_etcd

    ensure_installed()
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="servers-")))
    etcd = local_etcd(directory, flags, max_txn_ops)
    stack.callback(etcd.close)
    return etcd


def image(variable: str, env_file: Path = REPOSITORY / ".env") -> str:
    """Return the image that the shell or `.env` names, as Compose would read it.

    Raises ServersUnavailableError.
    """
    if variable in os.environ:
        return os.environ[variable]
    if env_file.exists():
        for line in env_file.read_text().splitlines():
            name, separator, value = line.partition("=")
            if separator and name.strip() == variable:
                return value.strip().strip("\"'")
    raise ServersUnavailableError(f"{env_file} does not name an image as {variable}")
