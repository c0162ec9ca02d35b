"""Servers in containers, made by testcontainers or by Compose."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import PurePath
from secrets import token_hex
from typing import Any

import docker
from docker.errors import DockerException, NotFound
from testcontainers.core.container import DockerContainer

from servers.processes import CommandFailedError, PacketFilter, ServersUnavailableError

_STOP_TIMEOUT_S = 30


@cache
def _engine() -> Any:
    return docker.from_env()


class Container:
    """Runs a server in a container. Its data, ports and address survive a stop.

    The container of that name exists already, or `start` makes it from a `recipe` and `close`
    removes it. `data` is the server's data directory, which `replace` needs.
    """

    workplace = PurePath("/")  # An image may have no other directory.

    def __init__(
        self,
        name: str,
        address: str = "127.0.0.1",
        recipe: DockerContainer | None = None,
        data: str = "",
    ) -> None:
        self.name, self.address = name, address
        self._recipe, self._data = recipe, data

    def start(self) -> None:
        """Start the container, or make it.

        Raises ServersUnavailableError if Docker cannot, because an image is missing for instance.
        """
        try:
            self._container.start()
        except NotFound:
            if self._recipe is None:
                raise
            try:
                self._recipe.start()
            except DockerException as error:
                said = f"Docker cannot start {self._recipe.image}: {error}"
                raise ServersUnavailableError(said) from error

    def stop(self) -> None:
        """Stop the server; Docker kills it after 30 s."""
        self._container.stop(timeout=_STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it with SIGKILL and wait until it has ended; Docker does not restart it."""
        self._container.kill()
        self._container.wait(timeout=_STOP_TIMEOUT_S)

    def pause(self) -> None:
        """Freeze all processes in the container."""
        self._container.pause()

    def resume(self) -> None:
        self._container.unpause()

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Disconnect it from its network: all packets are lost, and no connection is closed."""
        ((network, settings),) = self._container.attrs["NetworkSettings"]["Networks"].items()
        plug = _engine().networks.get(network)
        plug.disconnect(self.name)
        try:
            yield
        finally:
            plug.connect(self.name, ipv4_address=self.address, aliases=settings["Aliases"])

    @contextmanager
    def cut_off(self, peers: Iterable[Container]) -> Iterator[None]:
        """Drop packets from and to other containers; clients still reach it."""
        for peer in peers:
            self._packets().drop("INPUT", "-s", peer.address)
            self._packets().drop("OUTPUT", "-d", peer.address)
        try:
            yield
        finally:
            self._packets().clear()

    def dropped(self) -> int:
        """Return how many packets `cut_off` has dropped."""
        return self._packets().dropped()

    def erase(self) -> None:
        """Remove the container with its data; the next start makes a new one."""
        self.close()

    def replace(self, made: PurePath) -> None:
        """Put etcd's data from another directory in place of its own."""
        chunks, _ = self._container.get_archive(f"{made}/.")
        tree, emptied = b"".join(chunks), io.BytesIO()
        # Docker merges a directory into an existing one. A file replaces it with all its contents.
        with tarfile.open(fileobj=emptied, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("member"))
        for put in (emptied.getvalue(), tree):
            self._container.put_archive(self._data, put)

    def run(self, command: Sequence[str]) -> str:
        """Run a tool in the container; raises CommandFailedError."""
        try:
            code, said = self._container.exec_run(list(command), demux=True)
        except DockerException as error:
            raise CommandFailedError(f"{command[0]}: {error}") from error
        output, errors = ((part or b"").decode(errors="replace") for part in said)
        if code != 0:
            raise CommandFailedError(f"{' '.join(command)}: {output}{errors}")
        return output

    def output(self) -> str:
        with suppress(NotFound):
            return str(self._container.logs().decode(errors="replace"))
        return ""

    def close(self) -> None:
        """Remove the container made from the recipe, with its anonymous volume."""
        if self._recipe is not None:
            with suppress(NotFound):
                self._recipe.stop()

    @property
    def _container(self) -> Any:
        return _engine().containers.get(self.name)

    def _packets(self) -> PacketFilter:
        pid = self._container.attrs["State"]["Pid"]
        return PacketFilter("nsenter", f"--net=/proc/{pid}/ns/net")


def prepare_container(
    image: str,
    ports: Mapping[int, int],
    command: Sequence[str] = (),
    data: str = "",
    environment: Mapping[str, str] = {},
    mounts: Mapping[str, str] = {},
    hostname: str = "server",
) -> Container:
    """Prepare a container with {port in it: port on this machine}; `start` makes it.

    The ports are fixed, because Docker would choose others at every start. `mounts` maps files,
    directories (both read-only) and volumes to their paths in the container.
    """
    name = f"test-{token_hex(4)}"
    recipe = DockerContainer(image, env=dict(environment), name=name).with_kwargs(hostname=hostname)
    for source, place in mounts.items():
        recipe.with_volume_mapping(source, place, "ro" if source.startswith("/") else "rw")
    for inside, outside in ports.items():
        # For this machine alone, as in .env: anybody may log in to these servers.
        recipe.ports[str(inside)] = ("127.0.0.1", outside)
    if command:
        recipe.with_command(list(command))
    return Container(name, recipe=recipe, data=data)
