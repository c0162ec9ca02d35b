"""Until its last user imports from where it is."""

from servers.broker import EXCHANGE, Event, encode

__all__ = ["EXCHANGE", "Event", "encode"]
