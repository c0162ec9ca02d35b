"""The private names of pika that the library reads or replaces: a new release may drop them."""

import inspect
from typing import Any

import pika
import pytest
from pika import spec
from pika.adapters.utils.io_services_utils import (
    _AsyncPlaintextTransport as PlaintextTransport,
)
from pika.adapters.utils.io_services_utils import _AsyncSSLTransport as TlsTransport
from pika.adapters.utils.io_services_utils import _AsyncTransportBase as Transport
from pika.connection import Connection


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _attributes_set_by(initializer: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = initializer.__code__.co_names
    return names


@pytest.mark.parametrize(
    ("name", "used_in", "read", "expected"),
    [
        (
            "Connection._on_data_available",
            "amqp.py",
            lambda: _parameters(Connection._on_data_available),
            ["self", "data_in"],
        ),
        (
            "Connection._frame_buffer",
            "amqp.py",
            lambda: "_frame_buffer" in _attributes_set_by(Connection.__init__),
            True,
        ),
        (
            "BlockingConnection._impl",
            "cli/broker.py",
            lambda: "_impl" in _attributes_set_by(pika.BlockingConnection.__init__),
            True,
        ),
        (
            "spec.props",
            "amqp.py",
            lambda: spec.Basic.INDEX in spec.props,
            True,
        ),
        (
            "_AsyncTransportBase's _nbio, _sock, _state and _STATE_ACTIVE",
            "amqp.py",
            lambda: (
                {"_nbio", "_sock", "_state", "_STATE_ACTIVE"}
                <= {*_attributes_set_by(Transport.__init__)}
            ),
            True,
        ),
        (
            "_AsyncPlaintextTransport._on_socket_readable",
            "amqp.py",
            lambda: _parameters(PlaintextTransport._on_socket_readable),
            ["self"],
        ),
        (
            "_AsyncSSLTransport._on_socket_readable",
            "amqp.py",
            lambda: _parameters(TlsTransport._on_socket_readable),
            ["self"],
        ),
    ],
)
def test_pika_still_has_the_private_name(name: str, used_in: str, read: Any, expected: Any) -> None:
    sentence = (
        f"pika {pika.__version__} has no {name} as {used_in} uses it: keep pika's upper bound in "
        f"pyproject.toml below this version, or change {used_in}"
    )
    try:
        found = read()
    except AttributeError:
        pytest.fail(sentence)
    assert found == expected, sentence


def test_pika_keeps_the_beginning_of_a_frame_in_its_buffer() -> None:
    """What the reader leaves there is taken for the start of what comes next."""
    connection = pika.SelectConnection(
        pika.ConnectionParameters(), internal_connection_workflow=False
    )
    try:
        connection._on_data_available(b"\x01\x00")
        connection._on_data_available(b"\x01")
        assert connection._frame_buffer == b"\x01\x00\x01"
    finally:
        connection.ioloop.close()
