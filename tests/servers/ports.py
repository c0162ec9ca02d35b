"""Until its last user imports from where it is."""

from servers.processes import free_port

__all__ = ["free_port"]
