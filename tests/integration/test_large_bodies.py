"""Bodies far too large for events, which an alarm of the broker keeps from being parked."""

from chaos.outages import alarm
from integration.judging import StartService, becomes, lines, parked, says, throughout
from servers.broker import Broker
from servers.process import resident_bytes
from servers.servers import Servers
from servers.services import Service
from servers.wait import eventually

_MIB = 1024 * 1024
_BODIES = [bytes([number]) * 15 * _MIB for number in range(12)]

_PAUSED_S = 20.0
"""With a heartbeat of 1 s pika ends a connection on which nothing arrives within 12 s."""


def test_under_an_alarm_memory_is_bounded_and_the_connection_stays(
    start_service: StartService, clean: Servers, broker: Broker
) -> None:
    """The service stops reading, and goes on when the alarm is over: each body is parked."""
    assert start_service("order").terminate() == 0
    for body in _BODIES:
        broker.publish_raw(body)
    with alarm(clean.rabbitmq, "memory"):
        service = start_service("order", RABBITMQ_URL=f"{clean.rabbitmq.url}?heartbeat=1")
        eventually(lambda: says(service, "what is in flight is large"))
        throughout(_PAUSED_S, lambda: _bounded(service))
    becomes(lambda: broker.ready("order.dead-letter"), len(_BODIES), 60)
    assert lines(service, "no connection to RabbitMQ") == []
    assert sorted(message.body for message in parked(broker, "order", len(_BODIES))) == _BODIES


def _bounded(service: Service) -> None:
    """Half of the bodies would be too many; at rest a service takes some 60 MB."""
    limit = 100 * _MIB + sum(map(len, _BODIES)) / 2
    assert resident_bytes(service.pid) < limit
