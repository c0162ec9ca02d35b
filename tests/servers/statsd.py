"""Until its last user imports from where it is."""

from servers.counters import StatsdListener, listen_statsd

__all__ = ["StatsdListener", "listen_statsd"]
