"""The library without an effect: a service whose handler wants nothing recorded but the event."""

import sys

from idempotent_consumer import Event, Service

service = Service("bare", noun="events")


@service.handler("new_order")
def do_nothing(_event: Event) -> None:
    """Return no effect."""


if __name__ == "__main__":
    sys.exit(service.run())
