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
from typing import Literal

from chaos.acks import AckAudit
from chaos.proxy import Direction, Proxy, relay
from servers.processes import CommandFailedError, PacketFilter, run_tool
from servers.servers import Servers

Dependency = Literal["broker", "etcd"]
Lost = Literal["out", "in", "both"]

_CLONE_NEWNET = 0x40000000
_HELD: dict[Lost, Direction | Literal["both"]] = {"out": "up", "in": "down", "both": "both"}


class Partition:
    """The way between a service and one dependency, cut by holding bytes back.

    They arrive at the end, without TCP's sending again.
    """

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def cut(self, lost: Lost) -> None:
        """Let nothing through, of what the service sends (out) or of what comes to it (in)."""
        self._proxy.hold(_HELD[lost])

    def stopped(self) -> int:
        """Return how much the cut has kept from arriving: bytes, or packets."""
        return self._proxy.up.held_bytes + self._proxy.down.held_bytes

    def heal(self) -> None:
        self._proxy.release()


class _PacketPartition(Partition):
    """The same, cut by dropping packets in the namespace in which the proxy listens."""

    def __init__(self, proxy: Proxy, namespace: str) -> None:
        super().__init__(proxy)
        self._port = str(port_of(proxy.address))
        self._packets = PacketFilter("ip", "netns", "exec", namespace)

    def cut(self, lost: Lost) -> None:
        if lost != "in":
            self._packets.drop("INPUT", "-p", "tcp", "--dport", self._port)
        if lost != "out":
            self._packets.drop("OUTPUT", "-p", "tcp", "--sport", self._port)

    def stopped(self) -> int:
        return self._packets.dropped()

    def heal(self) -> None:
        self._packets.clear()


def _make_namespace(name: str) -> str:
    """Make a network namespace, tied to this one by a pair of interfaces; return its address.

    Raises CommandFailedError where a tool is absent, or the user or the kernel does not allow it.
    """
    # From 198.18.0.0/15, which is set apart for tests of networks (RFC 2544).
    network, first = f"198.18.{secrets.randbelow(256)}", 4 * secrets.randbelow(64)
    outside, inside = (f"{network}.{first + offset}" for offset in (1, 2))
    outer, inner = f"o-{name[-8:]}", f"i-{name[-8:]}"
    for command in (
        f"ip netns add {name}",
        f"ip link add {outer} type veth peer name {inner} netns {name}",
        f"ip addr add {outside}/30 dev {outer}",
        f"ip link set {outer} up",
        f"ip netns exec {name} ip addr add {inside}/30 dev {inner}",
        f"ip netns exec {name} ip link set {inner} up",
        f"ip netns exec {name} iptables -L -n",
    ):
        run_tool(command.split())
    return inside


def _listen(namespace: str, address: str) -> socket.socket:
    """Return a socket that listens inside, for this process: it keeps its namespace."""

    def enter_and_listen() -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        with (Path("/run/netns") / namespace).open() as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return socket.create_server((address, 0))

    # On a thread that ends here: setns changes the calling thread alone.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_listen).result()


@contextmanager
def relayed(
    dependency: Dependency, clean: Servers, acks: AckAudit, listener: socket.socket | None = None
) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """Relay to a dependency; yields the proxy, and the settings that lead a service through it.

    Acks are audited behind the proxy: as they arrive, not as they are sent.
    """
    port = port_of(acks.url if dependency == "broker" else clean.etcd.endpoint)
    with relay(port, listener) as proxy:
        if dependency == "etcd":
            yield proxy, {"ETCD_ENDPOINTS": proxy.address}
        else:
            yield proxy, {"RABBITMQ_URL": acks.url.replace(acks.address, proxy.address)}


@contextmanager
def cuttable(
    dependency: Dependency, clean: Servers, acks: AckAudit
) -> Iterator[tuple[Partition, dict[str, str]]]:
    """Do the same by a way that can be partitioned."""
    namespace, listener = f"chaos-{secrets.token_hex(4)}", None
    try:
        with suppress(CommandFailedError):
            listener = _listen(namespace, _make_namespace(namespace))
        with relayed(dependency, clean, acks, listener) as (proxy, settings):
            yield _PacketPartition(proxy, namespace) if listener else Partition(proxy), settings
    finally:
        with suppress(CommandFailedError):
            run_tool(["ip", "netns", "del", namespace])


def port_of(address: str) -> int:
    """Return the port of host:port, or of an URL that ends with it."""
    return int(address.rstrip("/").rpartition(":")[2])
