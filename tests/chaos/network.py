"""The ways from a service to its dependencies: through a proxy, or one that can be partitioned.

A partition drops packets where that is possible; elsewhere a proxy is silent. The listening socket
of the proxy is put into a network namespace of its own, behind a pair of virtual interfaces.
iptables drops packets in there, so the machine's own firewall is never touched, and TCP on both
sides does what it does in a real partition: it sends again, ever more slowly.
"""

import ctypes
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

from chaos.acks import AckAudit
from chaos.proxy import Proxy, relay
from servers.processes import SHOW_RULES, CommandFailedError, dropped_packets, run_tool
from servers.servers import Servers

Dependency = Literal["broker", "etcd"]
Lost = Literal["out", "in", "both"]

_CLONE_NEWNET = 0x40000000


class Partition(Protocol):
    """The way between a service and one dependency."""

    @property
    def address(self) -> str:
        """What the service connects to, as host:port."""

    def cut(self, lost: Lost) -> None:
        """Let nothing through, of what the service sends (out) or of what comes to it (in)."""

    def stopped(self) -> int:
        """Return how much the cut has kept from arriving: packets, or bytes."""

    def heal(self) -> None:
        """Let everything through again."""


class _Packets:
    """Cuts by iptables."""

    def __init__(self, proxy: Proxy, namespace: "_Namespace") -> None:
        self._namespace, self.address = namespace, proxy.address
        port = proxy.address.rpartition(":")[2]
        self._rules = {
            "out": ("INPUT", "-p", "tcp", "--dport", port, "-j", "DROP"),
            "in": ("OUTPUT", "-p", "tcp", "--sport", port, "-j", "DROP"),
        }

    def cut(self, lost: Lost) -> None:
        for name, rule in self._rules.items():
            if lost in (name, "both"):
                self._namespace.run("iptables", "-A", *rule)

    def stopped(self) -> int:
        return dropped_packets(self._namespace.run("iptables", *SHOW_RULES))

    def heal(self) -> None:
        self._namespace.run("iptables", "-F")


class _Bytes:
    """Cuts by holding bytes back: they arrive at the end, without TCP's sending again."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy, self.address = proxy, proxy.address

    def cut(self, lost: Lost) -> None:
        self._proxy.hold("up" if lost == "out" else "down" if lost == "in" else "both")

    def stopped(self) -> int:
        return self._proxy.up.held_bytes + self._proxy.down.held_bytes

    def heal(self) -> None:
        self._proxy.release()


class _Namespace:
    """A network namespace, tied to this one by a pair of interfaces."""

    def __init__(self) -> None:
        self._name = f"chaos-{secrets.token_hex(4)}"
        # From 198.18.0.0/15, which is set apart for tests of networks (RFC 2544).
        network, first = f"198.18.{secrets.randbelow(256)}", 4 * secrets.randbelow(64)
        self._outside, self._inside = (f"{network}.{first + offset}" for offset in (1, 2))

    def make(self) -> bool:
        """Make it; False where a tool is absent, or the user or the kernel does not allow it."""
        outer, inner = f"o-{self._name[-8:]}", f"i-{self._name[-8:]}"
        try:
            run_tool(["ip", "netns", "add", self._name])
            pair = f"ip link add {outer} type veth peer name {inner} netns {self._name}"
            run_tool(pair.split())
            run_tool(["ip", "addr", "add", f"{self._outside}/30", "dev", outer])
            run_tool(["ip", "link", "set", outer, "up"])
            self.run("ip", "addr", "add", f"{self._inside}/30", "dev", inner)
            self.run("ip", "link", "set", inner, "up")
            self.run("iptables", "-L", "-n")
        except CommandFailedError:
            return False
        return True

    def run(self, *command: str) -> str:
        """Run a tool inside; raises CommandFailedError."""
        return run_tool(["ip", "netns", "exec", self._name, *command])

    def listen(self) -> socket.socket:
        """Return a socket that listens inside, for this process: it keeps its namespace."""

        def enter_and_listen() -> socket.socket:
            libc = ctypes.CDLL(None, use_errno=True)
            with (Path("/run/netns") / self._name).open() as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.create_server((self._inside, 0))

        # On a thread that ends here: setns changes the calling thread alone.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter_and_listen).result()

    def remove(self) -> None:
        """Remove it with its interfaces and rules, as far as it was made."""
        with suppress(CommandFailedError):
            run_tool(["ip", "netns", "del", self._name])


@contextmanager
def relayed(
    dependency: Dependency, clean: Servers, acks: AckAudit
) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """Relay to a dependency; yields the proxy, and the settings that lead a service through it."""
    with relay(_port(dependency, clean, acks)) as proxy:
        yield proxy, _settings(dependency, acks, proxy.address)


@contextmanager
def cuttable(
    dependency: Dependency, clean: Servers, acks: AckAudit
) -> Iterator[tuple[Partition, dict[str, str]]]:
    """Do the same by a way that can be partitioned."""
    port, namespace = _port(dependency, clean, acks), _Namespace()
    way: Partition
    try:
        dropping = namespace.make()
        with relay(port, namespace.listen() if dropping else None) as proxy:
            way = _Packets(proxy, namespace) if dropping else _Bytes(proxy)
            yield way, _settings(dependency, acks, way.address)
    finally:
        namespace.remove()


def _port(dependency: Dependency, clean: Servers, acks: AckAudit) -> int:
    return port_of(acks.url if dependency == "broker" else clean.etcd.endpoint)


def _settings(dependency: Dependency, acks: AckAudit, address: str) -> dict[str, str]:
    if dependency == "etcd":
        return {"ETCD_ENDPOINTS": address}
    # Acks are audited behind the proxy: as they arrive, not as they are sent.
    login, _, _ = acks.url.rpartition("@")
    return {"RABBITMQ_URL": f"{login}@{address}/"}


def port_of(address: str) -> int:
    """Return the port of host:port, or of an URL that ends with it."""
    return int(address.rstrip("/").rpartition(":")[2])
