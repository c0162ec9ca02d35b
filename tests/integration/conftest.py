"""What the tests of the services need beside the servers."""

from collections.abc import Iterator

import pytest

from integration.sink import Sink, listen_http


@pytest.fixture
def sink() -> Iterator[Sink]:
    """Give a receiver of notifications of this test's own."""
    with listen_http() as running:
        yield running
