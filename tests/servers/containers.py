"""RabbitMQ and etcd in containers, by testcontainers."""

import contextlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from types import MappingProxyType

from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from testcontainers.core.container import DockerContainer, ExecConfig

from servers.packages import ServersUnavailableError
from servers.ports import free_port
from servers.server import ETCD_ENVIRONMENT, CommandFailedError, Etcd, RabbitMQ

_STOP_TIMEOUT_S = 30


class ContainerRunner:
    """Runs a server in one container, which keeps its data and its ports over a stop."""

    def __init__(
        self,
        image: str,
        ports: Mapping[int, int],
        command: Sequence[str] = (),
        data: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Take `ports` as {port in the container: port on this machine}.

        They are fixed: a port that Docker chooses changes at every start of the container.
        `data` is the server's directory, where it is to be replaced.
        """
        self._image = image
        self._ports = dict(ports)
        self._command = list(command)
        self._data = data
        self._environment = dict(environment)
        self._box: DockerContainer | None = None

    def start(self) -> None:
        """Create the container, or start it again.

        Raises ServersUnavailableError if Docker cannot, for want of the image for instance.
        """
        if self._box is not None:
            self._container.start()
            return
        try:
            box = DockerContainer(self._image)
            for inside, outside in self._ports.items():
                box.with_bind_ports(inside, outside)
            box.with_envs(**self._environment)
            if self._command:
                box.with_command(self._command)
            self._box = box
            box.start()
        except DockerException as error:
            self.close()
            raise ServersUnavailableError(f"Docker cannot start {self._image}: {error}") from error

    def stop(self) -> None:
        """Ask the server to end; Docker kills it after 30 s."""
        self._container.stop(timeout=_STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        self._container.kill()
        self._container.wait(timeout=_STOP_TIMEOUT_S)

    def pause(self) -> None:
        """Freeze all processes in the container."""
        self._container.pause()

    def resume(self) -> None:
        """Let them go on."""
        self._container.unpause()

    def erase(self) -> None:
        """Remove the container with its data; the next start makes a new one."""
        self.close()

    def run(self, command: Sequence[str]) -> str:
        """Run a tool in the container; raises CommandFailedError."""
        if self._box is None:
            raise CommandFailedError(f"{command[0]}: there is no container")
        try:
            result = self._box.exec(ExecConfig(list(command)))
        except DockerException as error:
            raise CommandFailedError(f"{command[0]}: {error}") from error
        text: str = result.output.decode(errors="replace")
        if result.exit_code != 0:
            raise CommandFailedError(f"{' '.join(command)}: {text}")
        return text

    @property
    def workplace(self) -> PurePath:
        """Where tools can leave files: an image need not have more than its root."""
        return PurePath("/")

    def replace(self, made: PurePath) -> None:
        """Put what a directory holds in place of what its data has under the same names."""
        chunks, _ = self._container.get_archive(f"{made}/.")
        tree = b"".join(chunks)
        with tarfile.open(fileobj=io.BytesIO(tree)) as archive:
            names = {parts[0] for member in archive if (parts := PurePath(member.name).parts)}
        # Docker merges a directory into one that is there, but puts a file in its place: what it
        # held is then gone.
        self._container.put_archive(self._data, _empty_files(names))
        self._container.put_archive(self._data, tree)

    def output(self) -> str:
        """Return the server's log."""
        if self._box is None:
            return ""
        log: bytes = self._container.logs()
        return log.decode(errors="replace")

    def close(self) -> None:
        """Remove the container and its anonymous volume."""
        if self._box is not None:
            with contextlib.suppress(NotFound):
                self._box.stop()
            self._box = None

    @property
    def _container(self) -> Container:
        if self._box is None:
            raise RuntimeError(f"no container of {self._image} has been started")
        return self._box.get_wrapped_container()


def _empty_files(names: Iterable[str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return made.getvalue()


def container_rabbitmq(image: str) -> RabbitMQ:
    """Prepare a broker; it is not started yet."""
    amqp_port, management_port = free_port(), free_port()
    runner = ContainerRunner(image, {5672: amqp_port, 15672: management_port})
    return RabbitMQ(runner, amqp_port, management_port)


def container_etcd(image: str, flags: Sequence[str], max_txn_ops: int) -> Etcd:
    """Prepare an etcd node with more `flags`; it is not started yet."""
    port, data = free_port(), "/etcd-data"
    command = [
        "/usr/local/bin/etcd",
        "--name=harness",
        f"--data-dir={data}",
        "--listen-client-urls=http://0.0.0.0:2379",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        *flags,
    ]
    runner = ContainerRunner(image, {2379: port}, command, data, ETCD_ENVIRONMENT)
    return Etcd(runner, port, max_txn_ops)
