"""A service that publishes: it ships each order, and tells the others by an event of its own.

    python idempotent_consumer/examples/shipment.py

The parcel, the record of the order and the event to come are one transaction in etcd. The event
is published after that, with the broker's confirm, and by whoever comes next if this process dies
first. It may so be published twice, with one id: who consumes it with this library skips a repeat.
"""

from __future__ import annotations

import sys

from idempotent_consumer import Effects, Event, Publish, Put, Service, encode_id

service = Service("shipment", noun="parcels")


@service.handler("new_order")
def ship(event: Event) -> Effects:
    """Return the parcel, and the event that tells of it."""
    return [
        Put("/parcels/" + encode_id(event.id), b"packed"),
        Publish("order_shipped", {"order": event.id}),
    ]


if __name__ == "__main__":
    sys.exit(service.run())
