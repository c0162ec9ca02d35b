"""Fixtures for tests on real servers: one pair per session, empty for each test."""

import logging
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from chaos.receiver import Receiver
from chaos.rig import Rig
from chaos.trial import Result, table
from servers.broker import Broker
from servers.counters import StatsdListener, listen_statsd
from servers.etcd import Store
from servers.servers import Servers, docker_available, start_servers
from servers.services import Service, run_service

RunService = Callable[..., Service]

_started = pytest.StashKey[list[Service]]()
_results = pytest.StashKey[list[Result]]()


@pytest.fixture(scope="session")
def docker() -> None:
    """Skip the test if no Docker engine answers."""
    if not docker_available():
        pytest.skip("it needs Docker, which does not answer")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Start RabbitMQ and etcd for the session; a test may stop, kill and freeze them."""
    with start_servers() as running:
        yield running


@pytest.fixture
def clean(servers: Servers) -> Servers:
    """Give the servers running and empty: no queue of a service, no key in etcd.

    The exchange stays. No service runs between two tests, so its keys may be deleted.
    """
    servers.heal()
    Broker(servers.rabbitmq).delete_queues("order", "notify", "shipment")
    Store(servers.etcd).clear()
    return servers


@pytest.fixture
def store(clean: Servers) -> Store:
    """Give an empty etcd, whose history begins with this test."""
    return Store(clean.etcd, since=Store(clean.etcd).client.revision())


@pytest.fixture
def broker(clean: Servers) -> Broker:
    """Give the broker, without queues of the services."""
    return Broker(clean.rabbitmq)


@pytest.fixture
def statsd() -> Iterator[StatsdListener]:
    with listen_statsd() as listener:
        yield listener


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver that takes 50 ms for each call, so that faults occur during calls."""
    with closing(Receiver(latency_s=0.05)) as running:
        yield running


@pytest.fixture
def start_service(
    clean: Servers,
    statsd: StatsdListener,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[RunService]:
    """Start services on the servers, with records in etcd; they are killed after the test.

    `start_service("order", BATCH_SIZE="1")` waits until the service is ready, unless `wait` is
    false. Under the service's name it can also run a program of the test's own: `script` is its
    text, or `command` its command line. A failed test shows the end of each log.
    """
    defaults = {**clean.settings(), **statsd.settings(), "ENABLE_ETCD": "true"}
    services = request.node.stash[_started] = list[Service]()
    with ExitStack() as stack:

        def start(
            name: str,
            *,
            wait: bool = True,
            script: str = "",
            command: Sequence[str] = (),
            **settings: str,
        ) -> Service:
            if script:
                (program := tmp_path / f"its_{name}.py").write_text(script)
                command = [sys.executable, str(program)]
            settings = {**defaults, **settings}
            running = run_service(name, settings, log_directory=tmp_path, command=command)
            services.append(stack.enter_context(running))
            if wait:
                services[-1].wait_ready()
            return services[-1]

        yield start


@pytest.fixture
def rig(
    clean: Servers, broker: Broker, store: Store, statsd: StatsdListener, start_service: RunService
) -> Rig:
    """Give empty servers, with what reads them and what starts services on them."""
    return Rig(clean, broker, store, statsd, start_service)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> list[Result]:
    """Give the list to which trials add their results, for the table at the end."""
    return request.config.stash[_results]


def pytest_configure(config: pytest.Config) -> None:
    """Make that list, and silence pika: it logs ten lines for each refused connection."""
    config.stash[_results] = []
    logging.getLogger("pika").setLevel(logging.CRITICAL)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if results := config.stash[_results]:
        terminalreporter.section("trials")
        terminalreporter.write_line(table(results))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of each service's log with a failed test."""
    report = yield
    if report.failed:
        for service in item.stash.get(_started, []):
            report.sections.append(
                (f"log of {service.name} ({service.pid})", service.output()[-8000:])
            )
    return report
