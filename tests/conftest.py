"""Fixtures for whatever needs real servers: one pair per session, empty for each test."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.receiver import Receiver, listen_http
from servers.broker import Broker
from servers.counters import StatsdListener, listen_statsd
from servers.etcd import Store
from servers.servers import Servers, start_servers
from servers.services import Service, run_service

RunService = Callable[..., Service]

_started = pytest.StashKey[list[Service]]()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Start RabbitMQ and etcd for the session; a test may stop, kill and freeze them."""
    with start_servers() as running:
        yield running


@pytest.fixture
def clean(servers: Servers) -> Servers:
    """Give the servers running and empty: no queue of a service, no key in etcd.

    The exchange stays. Deleting the services' own keys is safe, as none of them runs between
    two tests.
    """
    servers.heal()
    Broker(servers.rabbitmq).delete_queues("order", "notify", "shipment")
    Store(servers.etcd).clear()
    return servers


@pytest.fixture
def store(clean: Servers) -> Store:
    """Give an empty etcd; its history begins with this test."""
    return Store(clean.etcd, since=Store(clean.etcd).client.revision())


@pytest.fixture
def broker(clean: Servers) -> Broker:
    """Give the broker without queues of the services."""
    return Broker(clean.rabbitmq)


@pytest.fixture
def statsd() -> Iterator[StatsdListener]:
    """Give a statsd listener of this test's own."""
    with listen_statsd() as listener:
        yield listener


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver of notifications of this test's own."""
    with listen_http() as running:
        yield running


@pytest.fixture
def start_service(
    clean: Servers,
    statsd: StatsdListener,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[RunService]:
    """Start services against the servers and the listener; they end with the test.

    `start_service("order", BATCH_SIZE="1")` waits until the service is ready, with records in
    etcd; `wait=False` does not wait, and `command` starts it otherwise than by its name. Its log
    is shown when the test fails.
    """
    defaults = {**clean.settings(), **statsd.settings(), "ENABLE_ETCD": "true"}
    services: list[Service] = []
    request.node.stash[_started] = services
    with ExitStack() as stack:

        def start(
            name: str, *, wait: bool = True, command: Sequence[str] | None = None, **settings: str
        ) -> Service:
            running = run_service(
                name, {**defaults, **settings}, log_directory=tmp_path, command=command
            )
            service = stack.enter_context(running)
            services.append(service)
            if wait:
                service.wait_ready()
            return service

        yield start


def pytest_configure() -> None:
    """Keep pika from filling the output of a failed test.

    It logs ten lines for every refused connection, and tests here restart the broker.
    """
    logging.getLogger("pika").setLevel(logging.CRITICAL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of each service's log with a failed test."""
    report = yield
    if report.failed:
        for service in item.stash.get(_started, []):
            report.sections.append(
                (f"log of {service.name} ({service.pid})", service.logs()[-8000:])
            )
    return report
