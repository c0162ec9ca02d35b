"""Writes a document for each new_order event, together with the event's record."""

from __future__ import annotations

import sys

import orjson

from idempotent_consumer import Event, Put, Service, encode_id

service = Service("placeholder", noun="placeholder_events")


@service.handler("new_order")
def handle(event: Event) -> Put:
    """Return the document as the one effect: etcd writes it with the record, or neither."""
    document = orjson.dumps({"id": event.id, "args": event.args})
    return Put("/documents/placeholder/" + encode_id(event.id), document)


if __name__ == "__main__":
    sys.exit(service.run())
