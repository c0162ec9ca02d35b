"""The ways from a service to its dependencies: through a proxy that delays, holds or drops.

If the machine allows it, a partition drops packets: the proxy then listens in a network namespace
of its own, behind a pair of virtual interfaces. iptables runs only in that namespace, so it never
touches the machine's firewall, and TCP behaves as in a real partition: it retransmits, ever more
slowly. Otherwise the proxy holds the bytes back.
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
    """A way to one dependency, partitioned by holding bytes back.

    They arrive when it heals, without any retransmission by TCP.
    """

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def cut(self, lost: Lost) -> None:
        """Lose what the service sends ("out"), what it receives ("in"), or both."""
        self._proxy.hold(_HELD[lost])

    def stopped(self) -> int:
        """Return how many bytes, or packets, the partition has stopped."""
        return self._proxy.up.held_bytes + self._proxy.down.held_bytes

    def heal(self) -> None:
        self._proxy.release()


class _PacketPartition(Partition):
    """A way that is partitioned by dropping packets in the namespace of its proxy."""

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
    """Make a network namespace, joined to this one by a pair of interfaces; return its address.

    Raises CommandFailedError if a tool is missing, or if the user or the kernel does not allow it.
    """
    # From 198.18.0.0/15, which is reserved for network tests (RFC 2544).
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
    """Return a socket that listens in a namespace; a socket keeps the namespace it was made in."""

    def enter_and_listen() -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        with (Path("/run/netns") / namespace).open() as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return socket.create_server((address, 0))

    # On a thread of its own: setns changes only the calling thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_listen).result()


@contextmanager
def relayed(
    dependency: Dependency, clean: Servers, acks: AckAudit, listener: socket.socket | None = None
) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """Relay to a dependency; yield the proxy, and the settings that make a service use it.

    Acks are audited behind the proxy: when they arrive, not when they are sent.
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
    """Do the same for a way that can be partitioned."""
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
    """Return the port of host:port, or of a URL that ends with it."""
    return int(address.rstrip("/").rpartition(":")[2])
