"""One node: a container of the compose project, and the ways to take it from the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

from servers.local import run_tool


class Node:
    """Runs one server of the cluster. Its data and its address outlive a stop."""

    def __init__(self, project: str, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.container, self._network = f"{project}-{name}-1", f"{project}_default"

    def start(self) -> None:
        """Start the container again."""
        self._docker("start", self.container)

    def stop(self) -> None:
        """Ask the server to end."""
        self._docker("stop", self.container)

    def kill(self) -> None:
        """End it with SIGKILL; Docker then leaves it down."""
        self._docker("kill", self.container)

    def pause(self) -> None:
        """Freeze it."""
        self._docker("pause", self.container)

    def resume(self) -> None:
        """Let it go on."""
        self._docker("unpause", self.container)

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Cut it off from everybody: its packets and those to it go nowhere, and nobody is told."""
        self._docker("network", "disconnect", self._network, self.container)
        try:
            yield
        finally:
            self._docker(
                "network",
                "connect",
                "--ip",
                self.address,
                "--alias",
                self.name,
                self._network,
                self.container,
            )

    @contextmanager
    def cut_off(self, peers: Iterable[Node]) -> Iterator[None]:
        """Drop what comes from other nodes and goes to them; clients still reach it."""
        for peer in peers:
            self._iptables("-A", "INPUT", "-s", peer.address, "-j", "DROP")
            self._iptables("-A", "OUTPUT", "-d", peer.address, "-j", "DROP")
        try:
            yield
        finally:
            self._iptables("-F")

    def dropped(self) -> int:
        """Return how many packets that cut has dropped."""
        rules = self._iptables("-L", "-v", "-n", "-x")
        return sum(map(int, re.findall(r"^\s*(\d+)\s+\d+\s+DROP\s", rules, re.MULTILINE)))

    def run(self, command: Sequence[str]) -> str:
        """Run a tool in the container; raises CommandFailedError."""
        return self._docker("exec", self.container, *command)

    def output(self) -> str:
        """Return the server's log."""
        return self._docker("logs", self.container)

    def erase(self) -> None:
        """Refuse: what a node holds is not its own but the cluster's."""
        raise NotImplementedError

    def replace(self, made: PurePath) -> None:
        """Refuse, likewise."""
        raise NotImplementedError

    @property
    def workplace(self) -> PurePath:
        """Where tools can leave files."""
        return PurePath("/tmp")

    def close(self) -> None:
        """Leave it to the project, which is taken down as a whole."""

    def _docker(self, *arguments: str) -> str:
        return run_tool(["docker", *arguments])

    def _iptables(self, *arguments: str) -> str:
        pid = self._docker("inspect", "--format", "{{.State.Pid}}", self.container).strip()
        return run_tool(["nsenter", f"--net=/proc/{pid}/ns/net", "iptables", *arguments])
