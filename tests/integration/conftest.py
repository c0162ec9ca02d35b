"""The fixtures of trials, and their markers."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from chaos.acks import AckAudit
from chaos.durations import MINUTES, SEED
from chaos.network import port_of
from chaos.proxy import Proxy, relay
from chaos.rig import Rig
from chaos.trial import Result, StartTrial, Trial
from servers.servers import Servers

# The soak is collected only if CHAOS_MINUTES is set.
collect_ignore = [] if MINUTES else ["test_soak.py"]


def pytest_report_header() -> list[str]:
    """Say how to repeat the soak."""
    return [f"soak: CHAOS_MINUTES={MINUTES:g} CHAOS_SEED={SEED}"] if MINUTES else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each trial as chaos, and as long if it is not quick, before -m selects."""
    for item in items:
        if "trial" in getattr(item, "fixturenames", ()):
            item.add_marker("chaos")
            if item.get_closest_marker("quick") is None:
                item.add_marker("long")


@pytest.fixture
def acks(clean: Servers) -> Iterator[AckAudit]:
    """Give a proxy between the services and the broker that notes each ack before its record."""
    with closing(AckAudit(clean.rabbitmq, clean.etcd)) as audit:
        yield audit


@pytest.fixture
def trial(rig: Rig, acks: AckAudit, results: list[Result]) -> StartTrial:
    """Begin a trial: `trial("broker killed", service="order")`."""

    def begin(fault: str, *, service: str = "order") -> Trial:
        return Trial(fault, service, rig, results, acks)

    return begin


@pytest.fixture
def way(clean: Servers) -> Iterator[Proxy]:
    """Give a proxy to etcd."""
    with relay(port_of(clean.etcd.endpoint)) as running:
        yield running
