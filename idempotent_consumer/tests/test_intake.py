"""A consumer that the broker cancels: why, and what becomes of its deliveries."""

from __future__ import annotations

from typing import Any

import pika.exceptions
import pytest
import structlog
from structlog.testing import LogCapture

from fakes.amqp import Broker, Loop
from idempotent_consumer.bus.intake import GONE_WITHIN_S, Intake
from idempotent_consumer.health import Health

DELETED = pika.exceptions.ChannelClosedByBroker(404, "NOT_FOUND - no queue 'order' in vhost '/'")


class World:
    """An intake, the broker that it consumes from, and what it has said and returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop, self.log = Loop(), LogCapture()
        self.broker = Broker.reached(self.loop, monkeypatch)
        self.returned: list[int] = []
        log: Any = structlog.wrap_logger(None, processors=[self.log])
        self.intake = Intake(
            "order",
            ["amqp://h/"],
            10,
            (),
            self.loop,  # type: ignore[arg-type]
            Health(),
            log,
            lambda _: None,
            self.returned.append,
        )
        self.intake.open()
        self.broker.connection.accept()

    @property
    def why(self) -> list[str]:
        """Why connections have been lost."""
        return [entry["error"] for entry in self.log.entries if "error" in entry]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Give an intake that consumes."""
    return World(monkeypatch)


def test_a_queue_that_is_gone_was_deleted(world: World) -> None:
    world.broker.channel.deliver()
    world.broker.channel.cancel()
    world.loop.advance(GONE_WITHIN_S)
    assert world.broker.channel.asked == ["order"]
    world.broker.channel.end(DELETED)
    world.loop.advance(0)
    (why,) = world.why
    assert why.endswith("no queue 'order' in vhost '/': it was deleted, and is declared anew")
    assert world.returned == [1]


def test_a_queue_that_is_there_means_that_a_delivery_was_unacked_for_too_long(
    world: World,
) -> None:
    """The oldest one in hand tells for how long: until the cancel, not until the queue was seen."""
    world.broker.channel.deliver()
    world.loop.advance(7)
    world.broker.channel.deliver()
    world.loop.advance(1)
    world.broker.channel.cancel()
    world.loop.advance(GONE_WITHIN_S)
    world.broker.channel.answer()
    world.loop.advance(0)
    (why,) = world.why
    assert "longer than the broker's consumer_timeout (the oldest for 8.0 s)" in why
    assert "deleted" not in why


def test_a_delivery_that_was_acked_meanwhile_is_not_said_to_be_held(world: World) -> None:
    world.broker.channel.cancel()
    world.loop.advance(GONE_WITHIN_S)
    world.broker.channel.answer()
    world.loop.advance(0)
    assert "consumer_timeout (none is unacked now)" in world.why[0]


def test_a_deleted_queue_is_looked_for_only_once_it_can_be_gone(world: World) -> None:
    """The broker cancels consumers first: asked at once, it says that the queue is there."""
    world.broker.channel.cancel()
    world.loop.advance(GONE_WITHIN_S / 2)
    assert world.broker.channel.asked == []


def test_what_a_cancelled_consumer_holds_goes_back_and_another_consumes(world: World) -> None:
    """Its channel would keep the deliveries that are not overdue, and get no others."""
    for _ in range(3):
        world.broker.channel.deliver()
    world.broker.channel.cancel()
    world.loop.advance(GONE_WITHIN_S)
    world.broker.channel.answer()
    world.loop.advance(0)
    assert world.returned == [3]
    world.loop.advance(1)
    world.broker.connection.accept()
    assert len(world.broker.connections) == 2
    world.broker.channel.deliver()
    assert world.intake.in_hand == 1


def test_a_connection_that_is_lost_meanwhile_is_lost_for_its_own_reason(world: World) -> None:
    world.broker.channel.cancel()
    world.broker.connection.lose()
    first = world.broker.channel
    world.loop.advance(GONE_WITHIN_S)
    assert first.asked == []
    assert [why for why in world.why if "lost" in why] == world.why
    assert len(world.why) == 1
