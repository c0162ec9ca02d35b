"""AMQP on the wire: addresses and failures of RabbitMQ, and when pika's bytes are written."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from typing import Any

import pika.exceptions as amqp
import pytest
import structlog

from idempotent_consumer.amqp import (
    TCP_OPTIONS,
    Connection,
    explain,
    parameters_of,
)
from idempotent_consumer.bus import ClientChannel, RecoveringConnection
from idempotent_consumer.health import Health
from idempotent_consumer.service import real_system
from idempotent_consumer.settings import SettingsError


class Workflow(Exception):
    """pika wraps the errors of its attempts in one of these."""

    def __init__(self, *inner: Exception) -> None:
        super().__init__("a workflow failed")
        self.exceptions = inner


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (
            amqp.ChannelClosedByBroker(
                406, "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit'"
            ),
            "delete",
        ),
        (amqp.ProbableAuthenticationError("closed"), "user or the password"),
        (amqp.ConnectionClosedByBroker(403, "ACCESS_REFUSED"), "user or the password"),
        (Workflow(Workflow(amqp.ProbableAuthenticationError("closed"))), "user or the password"),
        (Workflow(OSError(111, "Connection refused")), "Connection refused"),
        (
            amqp.ConnectionClosedByBroker(320, "CONNECTION_FORCED - by an operator"),
            "by an operator",
        ),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_failure_of_rabbitmqs_is_told_in_one_line(error: Exception, part: str) -> None:
    line = explain(error)
    assert part in line
    assert "\n" not in line
    assert len(line) <= 700


def test_a_url_gets_the_librarys_heartbeat_unless_it_names_one() -> None:
    assert parameters_of("amqp://h/", "test").heartbeat == 10
    assert parameters_of("amqp://h/?heartbeat=60", "test").heartbeat == 60


@pytest.mark.parametrize(
    "query",
    [
        "heartbeat=soon",
        "socket_timeout=-1",
        "channel_max=x",
        "ssl_options=[]",
        "ssl_options={",
        "tcp_options={'TCP_KEEPIDLE':'abc'}",
    ],
)
def test_an_option_that_pika_does_not_take_is_a_wrong_setting(query: str) -> None:
    """And the password does not stand in the message."""
    with pytest.raises(SettingsError, match=r"^RABBITMQ_URL") as raised:
        parameters_of(f"amqp://guest:hunter2@h/?{query}", "test")
    assert "hunter2" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_virtual_host_that_no_frame_can_hold_is_a_wrong_setting() -> None:
    assert parameters_of("amqp://h/" + "v" * 255, "test").virtual_host == "v" * 255
    with pytest.raises(SettingsError, match=r"^RABBITMQ_URL: its virtual host"):
        parameters_of("amqp://h/" + "v" * 256, "test")


def test_the_advice_to_delete_a_queue_is_given_for_its_arguments_alone() -> None:
    """A consumer's time-out has the same code, and the advice would cost its events."""
    late = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out"
    other = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'order'"
    assert "delete" not in explain(amqp.ChannelClosedByBroker(406, late))
    assert "delete" in explain(amqp.ChannelClosedByBroker(406, other))


def test_a_url_without_heartbeats_is_a_wrong_setting() -> None:
    """Nothing else tells that a broker is frozen."""
    with pytest.raises(SettingsError, match="heartbeats"):
        parameters_of("amqp://localhost/?heartbeat=0", "test")


def test_a_node_that_vanishes_is_noticed_by_tcp_unless_the_url_says_otherwise() -> None:
    assert parameters_of("amqp://h/", "test").tcp_options == TCP_OPTIONS
    other = parameters_of("amqp://h/?tcp_options={'TCP_USER_TIMEOUT':1000}", "test")
    assert other.tcp_options == {"TCP_USER_TIMEOUT": 1000}


# Written.


class Wire(Connection):
    """pika's connection, with a transport that keeps what each write brings."""

    def __init__(self) -> None:
        self._unwritten, self._unwritten_bytes = [], 0
        self.writes: list[bytes] = []
        self._transport: Any = self

    @property
    def ioloop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def end(self) -> None:
        """Lose the transport."""
        self._transport = None

    emit = Connection._adapter_emit_data


def test_what_is_sent_in_one_turn_of_the_loop_is_one_write() -> None:
    async def send() -> list[bytes]:
        wire = Wire()
        for turn in ((b"1", b"2", b"3"), (b"4",), (b"5", b"6")):
            for data in turn:
                wire.emit(data)
            await asyncio.sleep(0)
        return wire.writes

    assert asyncio.run(send()) == [b"123", b"4", b"56"]


def test_large_data_is_written_at_once_and_in_its_place() -> None:
    """And it is not joined with more and more."""
    large = b"x" * 100_000

    async def send() -> list[bytes]:
        wire = Wire()
        for data in (b"1", large, b"2", large, b"3"):
            wire.emit(data)
        before = list(wire.writes)
        await asyncio.sleep(0)
        assert before == [b"1" + large, b"2" + large]
        return wire.writes

    assert asyncio.run(send()) == [b"1" + large, b"2" + large, b"3"]


def test_what_is_sent_behind_the_end_is_dropped() -> None:
    async def send() -> list[bytes]:
        wire, defects = Wire(), list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, error: defects.append(error))
        wire.emit(b"1")
        wire.end()
        await asyncio.sleep(0)
        assert defects == []
        return wire.writes

    assert asyncio.run(send()) == []


# Connected.


def test_a_connection_that_is_being_opened_can_be_closed() -> None:
    """To a server that takes connections and says nothing, as a frozen broker does."""
    connections: list[Connection] = []

    def connect(*parameters: Any, **callbacks: Any) -> Connection:
        connections.append(Connection(*parameters, **callbacks))
        return connections[0]

    async def run() -> None:
        system = dataclasses.replace(real_system(), connect=connect)
        log = structlog.get_logger()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            url = f"amqp://127.0.0.1:{server.getsockname()[1]}/"
            recovering = RecoveringConnection("test", [url], TCP_OPTIONS, system, Health(), log)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(recovering.run(never))
                accepted, _ = await asyncio.get_running_loop().sock_accept(server)
                with accepted:
                    await recovering.close()

    asyncio.run(run())
    assert [connection.is_closed for connection in connections] == [True]


async def never(_: ClientChannel) -> None:
    raise AssertionError("it was never open")
