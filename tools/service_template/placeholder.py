"""Writes a document for each new_order event, together with the event's record."""

import sys
from dataclasses import asdict, dataclass

import orjson

from idempotent_consumer import Event, Put, Service, encode_id

service = Service("placeholder", noun="placeholder_events")


@dataclass(frozen=True)
class Order:
    """The args of a new_order event. An event with other args is parked as invalid."""

    item: str = ""
    number: int = 1


@service.handler("new_order", model=Order)
def handle(event: Event, order: Order) -> Put:
    """Return the document as the one effect: etcd writes both it and the record, or neither."""
    document = orjson.dumps({"id": event.id, **asdict(order)})
    return Put("/documents/placeholder/" + encode_id(event.id), document)


if __name__ == "__main__":
    sys.exit(service.run())
