"""The ports of `.env`, and whether they are free."""

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.command import run
from demo.stage import CannotPlayError
from servers.ports import free_port

_EVERY_ADDRESS = ("", "0.0.0.0", "::")
_UDP = frozenset({"PORT_STATSD"})
_PROJECT = "com.docker.compose.project"
_FORM = f'{{{{.Names}}}}\t{{{{.Label "{_PROJECT}.working_dir"}}}}\t{{{{.Label "{_PROJECT}"}}}}'


@dataclass(frozen=True)
class Ports:
    """The published ports by variable, and the address they are published on."""

    address: str
    numbers: Mapping[str, int]

    @property
    def host(self) -> str:
        """Where this machine reaches them."""
        return "127.0.0.1" if self.address in _EVERY_ADDRESS else self.address

    @classmethod
    def read(cls, env_file: Path) -> "Ports":
        """Read `.env`; as with Compose, the environment wins. Raises CannotPlayError."""
        settings = {}
        for line in env_file.read_text().splitlines():
            name, separator, value = line.partition("=")
            if separator and not name.lstrip().startswith("#"):
                settings[name.strip()] = os.environ.get(name.strip(), value.strip())
        numbers = {}
        for name, value in settings.items():
            if name.startswith("PORT_"):
                if not value.isdecimal() or not 0 < int(value) < 65_536:
                    raise CannotPlayError(f"{name} is {value!r}: write a port, as in {name}=8080")
                numbers[name] = int(value)
        return cls(settings.get("PUBLISH_ADDRESS", ""), numbers)

    def elsewhere(self) -> "Ports":
        """Return free ports in their place, so that another stack can run beside."""
        return Ports(self.address, {name: free_port() for name in self.numbers})

    def settings(self) -> dict[str, str]:
        """Return them as Compose's variables."""
        return {name: str(number) for name, number in self.numbers.items()}

    def check_free(self, repository: Path) -> None:
        """Raise CannotPlayError if one is taken: by what, and how to go on."""
        taken = [name for name in self.numbers if self._taken(name)]
        if not taken:
            return
        listed = ", ".join(f"{self.numbers[name]} ({name})" for name in taken)
        others = " ".join(f"{name}={free_port()}" for name in taken)
        raise CannotPlayError(
            f"in use: port{'s' * (len(taken) > 1)} {listed}. {self._advice(taken, repository)}, "
            f"or choose {'others' if len(taken) > 1 else 'another'}: {others} make demo"
        )

    def _taken(self, name: str) -> bool:
        kind = socket.SOCK_DGRAM if name in _UDP else socket.SOCK_STREAM
        address = (self.address or "0.0.0.0", self.numbers[name])
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                # Connections that have just ended do not count; with UDP it would hide a listener.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                # A port below 1024 is not ours to bind, but Docker's; then a listener tells.
                return error.errno == errno.EADDRINUSE or (
                    error.errno == errno.EACCES and self._answers(self.numbers[name])
                )
        return False

    def _answers(self, number: int) -> bool:
        try:
            socket.create_connection((self.host, number), timeout=2).close()
        except OSError:
            return False
        return True

    def _advice(self, taken: list[str], repository: Path) -> str:
        """Say how to free the ports, by the containers that publish them."""
        containers, stacks = set(), set()
        for name in taken:
            publish = f"publish={self.numbers[name]}/{'udp' if name in _UDP else 'tcp'}"
            listed = run(["docker", "ps", "--filter", publish, "--format", _FORM], os.environ)
            for line in listed.splitlines():
                container, directory, project = line.split("\t")
                containers.add(container)
                stacks.add((directory, project))
        if {directory for directory, _ in stacks} == {str(repository)}:
            projects = sorted(project for _, project in stacks)
            # Compose names a project after its directory, unless it is told otherwise.
            own = projects == [repository.name.lower()]
            downs = [f"`docker compose -p {project} down`" for project in projects]
            down = "`make down`" if own else " and ".join(downs)
            return f"This project's own stack is running: stop it with {down}"
        if containers:
            return f"Stop the containers with `docker stop {' '.join(sorted(containers))}`"
        return "Stop what uses " + ("them" if len(taken) > 1 else "it")
