"""The ways from a service to its two dependencies, each through a proxy of the test's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from chaos.acks import AckAudit
from chaos.partition import Partition, partitionable
from chaos.proxy import Proxy, relay
from chaos.signs import port_of
from servers.servers import Servers

Dependency = Literal["broker", "etcd"]


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
    with partitionable(_port(dependency, clean, acks)) as way:
        yield way, _settings(dependency, acks, way.address)


def _port(dependency: Dependency, clean: Servers, acks: AckAudit) -> int:
    return port_of(acks.url if dependency == "broker" else clean.etcd.endpoint)


def _settings(dependency: Dependency, acks: AckAudit, address: str) -> dict[str, str]:
    if dependency == "etcd":
        return {"ETCD_ENDPOINTS": address}
    # Acks are audited behind the proxy: as they arrive, not as they are sent.
    login, _, _ = acks.url.rpartition("@")
    return {"RABBITMQ_URL": f"{login}@{address}/"}
