"""What a trial needs, and what marks it."""

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

# The soak is collected only where it is wanted.
collect_ignore = [] if MINUTES else ["test_soak.py"]


def pytest_report_header() -> list[str]:
    """Say first of all how the soak can be had again."""
    return [f"soak: CHAOS_MINUTES={MINUTES:g} CHAOS_SEED={SEED}"] if MINUTES else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each trial as chaos, and as long where it has no quick form, before -m chooses."""
    for item in items:
        if "trial" in getattr(item, "fixturenames", ()):
            item.add_marker("chaos")
            if item.get_closest_marker("quick") is None:
                item.add_marker("long")


@pytest.fixture
def acks(clean: Servers) -> Iterator[AckAudit]:
    """Stand between the services and the broker, and note each ack that comes too early."""
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
    """Give a way to etcd that can be held."""
    with relay(port_of(clean.etcd.endpoint)) as running:
        yield running
