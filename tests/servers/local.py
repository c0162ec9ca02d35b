"""Until its last user imports from where it is."""

from servers.processes import run_tool

__all__ = ["run_tool"]
