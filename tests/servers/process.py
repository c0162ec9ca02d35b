"""Until its last user imports from where it is."""

from servers.processes import Child, resident_bytes

__all__ = ["Child", "resident_bytes"]
