"""Consume events once, reliably: RabbitMQ delivers, etcd remembers, your handlers decide.

A whole service::

    from idempotent_consumer import Event, Put, Service, encode_id

    service = Service("order", noun="orders")

    @service.handler("new_order")
    def place_order(event: Event) -> Put:
        return Put("/orders/" + encode_id(event.id), b"placed")

    raise SystemExit(service.run())
"""

from .calls import Reject, RetryAfter
from .event import Effects, Event, InvalidEvent, Properties, Publish, Put
from .names import encode_id
from .producer import Producer, PublishError
from .service import Service
from .settings import Settings, SettingsError

__all__ = [
    "Effects",
    "Event",
    "InvalidEvent",
    "Producer",
    "Properties",
    "Publish",
    "PublishError",
    "Put",
    "Reject",
    "RetryAfter",
    "Service",
    "Settings",
    "SettingsError",
    "encode_id",
]
