"""Places an order for each new_order event: one document, written with the event's record."""

import sys

import orjson

from idempotent_consumer import Event, Put, Service, encode_id

service = Service("order", noun="orders")


@service.handler("new_order")
def place_order(event: Event) -> Put:
    """Return the order as the one effect: etcd writes it with the record, or neither."""
    order = {"id": event.id, "status": "placed", "args": event.args}
    return Put("/orders/" + encode_id(event.id), orjson.dumps(order))


if __name__ == "__main__":
    sys.exit(service.run())
