"""Until its last user imports from where it is."""

from servers.servers import docker_available

__all__ = ["docker_available"]
